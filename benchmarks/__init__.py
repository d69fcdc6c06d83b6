"""Benchmarks: hotslot beside a peer doing the same job, and beside what the hardware could do at best.

Run from a checkout: `scripts/bench swap`, or `python -m benchmarks.bench_swap`.
"""
