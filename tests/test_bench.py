"""The benchmarks run, compare what they time, and say so in tables and as JSON. No test of time."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import hotslot
from hotslot.cli import bench
from hotslot.errors import HotslotError

swap = bench.load("swap")
concurrency, merged, soak = bench.load("concurrency"), bench.load("merged"), bench.load("soak")
report, running = (import_module(f"hotslot_benchmarks.{name}") for name in ("report", "running"))
OPTIONS: dict[str, Any] = {"sizes": ["tiny"], "rounds": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def rows() -> Any:
    return swap.run(**OPTIONS)


def test_every_case_has_hotslot_peft_and_a_plain_copy(rows: Any) -> None:
    for slot_rank in (4, 16):
        for case in (swap.COLD, swap.WARM):
            kinds = {row.contender.split()[0] for row in rows if (row.case, row.slot_rank) == (case, slot_rank)}
            assert kinds == {"hotslot", "PEFT", "plain"}
    assert {(row.case, row.slot_rank) for row in rows if row.case == swap.INSTEAD} == {(swap.INSTEAD, 4)}
    prepared = {row.contender for row in rows if row.slot_rank == 4 and row.contender.endswith("prepared")}
    assert {name.removesuffix(", prepared") for name in prepared} <= {row.contender for row in rows}
    assert not any(row.case == swap.HOT for row in rows)  # the CPU's own memory is both host's and device's


def test_outputs_are_equal_and_ratios_add_up(rows: Any) -> None:
    for row in rows:
        assert row.error == 0 if row.slot_rank == 4 else row.error < 1e-4
        assert row.nbytes == 20 * 2 * 64 * 4 * 4
        assert math.isclose(row.gigabytes_per_second, row.nbytes / row.ms / 1e6)
        assert 0 < row.min_ms <= row.ms
        assert row.cpu_ms > 0
    one = {(row.case, row.slot_rank): row for row in rows if row.times_peft == 1.0}
    for row in rows:
        if row.case != swap.INSTEAD:
            assert math.isclose(row.times_peft * row.ms, one[row.case, row.slot_rank].ms)
    assert {row.contender.split()[0] for row in rows if row.percent_of_copy == 100} == {"plain"}


def test_a_swap_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotslot, "hotswap_adapter", lambda *arguments, **options: None)
    with pytest.raises(HotslotError, match="not those of a fresh load") as caught:
        swap.run(**OPTIONS)
    assert "hotslot hotswap_adapter" in str(caught.value)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with running.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "swap.png"
    bench.run_bench("swap", as_json=True, plot=plot, **OPTIONS)
    told = json.loads(capsys.readouterr().out)
    assert told["benchmark"] == "swap"
    assert told.keys() == {"benchmark", "date", "command", "hardware", "versions", "settings", "rows", "goals"}
    assert told["hardware"]["device"] == "cpu"
    assert told["hardware"]["cpu"]
    assert told["versions"]["torch"] == torch.__version__
    assert told["settings"] == {"threads": 1, "rounds": 1}
    assert {row["size"] for row in told["rows"]} == {"tiny"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    text = report.markdown(told)
    assert all(f"| {row['contender']} | {row['ms']:.2f} |" in text for row in told["rows"])


def test_a_plot_that_cannot_be_written_is_refused_before_anything_is_timed(tmp_path: Path) -> None:
    for plot in (tmp_path / "swap.nonsense", tmp_path / "absent" / "swap.png", tmp_path):
        with pytest.raises(HotslotError, match="plot cannot be written"):
            bench.run_bench("swap", plot=plot, sizes=["84MB"], rounds=1000, device="cpu")
    with pytest.raises(HotslotError, match="no plot"):
        bench.run_bench("slots", plot=tmp_path / "slots.png", sizes=["tiny"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    for case in ("swap", "forward"):
        with pytest.raises(HotslotError, match="no GPU"):
            bench.run_bench(case, device="cuda")


def test_table_and_goals(rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    as_9mb = [replace(row, size="9MB") for row in rows]
    goals = report.goals(as_9mb)
    assert [goal.text.split(":")[0] for goal in goals] == ["9MB"] * 7
    assert report.goals(rows) == []
    fast, slow = report.Goal("", found=5.0, wanted=5.0), report.Goal("", found=4.9, wanted=5.0)
    assert (fast.met, slow.met) == (True, False)
    assert (replace(fast, at_most=True).met, replace(fast, found=5.1, at_most=True).met) == (True, False)
    swap.render(as_9mb, report.describe("cpu", rounds=1), Console(width=160))
    out = capsys.readouterr().out
    assert "hotslot Swapper.activate" in out
    assert goals[0].text in out


def test_what_slots_cost_is_timed_and_compared() -> None:
    slots = bench.load("slots")
    rows = slots.run(["tiny"], rounds=1, device="cpu", modes=["eager"], tokens=[2])
    assert [row.variant for row in rows] == [
        "base, no slots",
        "neutral slots, rank 4",
        "active adapter, rank 4",
        "neutral slots, rank 16",
        "active adapter, rank 16",
    ]
    assert rows[0].times_base == 1
    assert all(0 < row.min_ms <= row.ms for row in rows)
    with pytest.raises(HotslotError, match="No such size"):
        slots.run(["7MB"])


def test_ways_to_compute_a_forward_pass_are_timed_and_compared() -> None:
    forward = bench.load("forward")
    rows = forward.run(["tiny"], rounds=1, device="cpu", modes=["eager"], tokens=[1, 3])
    without_triton = {name for name, design in forward.DESIGNS.items() if design not in forward.NEED_TRITON}
    assert {row.contender for row in rows} == {forward.BASE, forward.PEFT} | without_triton
    for row in rows:
        assert 0 < row.min_ms <= row.ms
        assert row.error < 1e-4 or row.contender == forward.BASE


@pytest.fixture(scope="module")
def merged_rows() -> Any:
    return merged.run(**OPTIONS, tokens=())


def test_swaps_by_merging_are_timed_and_compared_bit_for_bit(merged_rows: Any) -> None:
    jobs = [(dtype, method) for dtype in ("fp32", "bf16") for method in merged.METHODS]
    contenders = [merged.HOTSLOT, merged.PEFT, merged.COPY]
    assert [(row.dtype, row.job, row.contender) for row in merged_rows] == [
        (*job, c) for job in jobs for c in contenders
    ]
    for row in merged_rows:
        assert 0 < row.min_ms <= row.ms
        assert row.nbytes == 13 * 64 * 64 * 2 * (4 if row.dtype == "fp32" else 2)
        assert row.error == 0 or row.contender == merged.PEFT
    assert {row.contender for row in merged_rows if row.times_copy == 1} == {merged.COPY}
    lora = {(row.dtype, row.contender): row.ms for row in merged_rows if row.job == merged.LORA}
    goals = merged.goals(merged_rows)
    assert [(goal.wanted, goal.at_most) for goal in goals] == [(1, True), (3, True), (1, True), (6, True)]
    assert goals[0].found == lora["fp32", merged.HOTSLOT] / lora["fp32", merged.PEFT]
    assert goals[3].found == lora["bf16", merged.HOTSLOT] / lora["bf16", merged.COPY]


def test_a_merge_that_is_not_pefts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    activate = hotslot.Swapper.activate
    monkeypatch.setattr(hotslot.Swapper, "activate", lambda self, name: activate(self, "0"))
    with pytest.raises(HotslotError, match="not those of a fresh merge_and_unload"):
        merged.run(**OPTIONS, dtypes=["fp32"], tokens=())


def test_swaps_at_scale_are_compared_and_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bench.run_bench("scale", as_json=True, plot=tmp_path / "scale.png", sizes=["tiny"], rounds=10, device="cpu")
    told = json.loads(capsys.readouterr().out)
    series = {(row["series"], row["at"]) for row in told["rows"]}
    assert {("adapters known", "30"), ("rank", "8"), ("layers of the model", "8"), ("tier", "disk")} <= series
    assert all(row["swaps"] and row["ms"] > 0 and row["copy_ms"] > 0 for row in told["rows"])
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    with pytest.raises(HotslotError, match="No such size"):
        bench.load("scale").run(["nonsense"])


def test_a_gpus_benchmark_of_merges_compares_what_it_times(capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU, in small."""
    large = import_module("hotslot_benchmarks.large_merges")
    size = merged.LARGE[0]
    rows = large.run(size, 64, 1, rounds=1, device=torch.device("cpu"), tokens=())
    of_lora = {row.contender: row for row in rows if row.job == merged.LORA}
    assert of_lora.keys() == {merged.HOTSLOT, merged.PEFT, merged.ADDMM, merged.COPY}
    assert 0 < of_lora[merged.HOTSLOT].error <= of_lora[merged.PEFT].error < 0.1
    assert of_lora[merged.COPY].times_copy == 1
    assert merged.goals(rows)[1].wanted == merged.LARGE_COPY_FACTOR
    merged.render(rows, report.describe("cpu", rounds=1), Console(width=200))
    assert "% lost" in capsys.readouterr().out


def test_merging_in_table_and_plot(merged_rows: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conditions = report.describe("cpu", rounds=1)
    merged.render(merged_rows, conditions, Console(width=200))
    out = capsys.readouterr().out
    assert merged.HOTSLOT in out
    assert "as merged anew" in out
    assert merged.goals(merged_rows)[0].text in out
    merged.draw(merged_rows, conditions, tmp_path / "merged.png")
    assert (tmp_path / "merged.png").read_bytes().startswith(b"\x89PNG")


def test_the_forward_pass_of_a_merged_model_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged, "METHODS", {merged.LORA: merged.METHODS[merged.LORA]})
    rows = merged.run(**OPTIONS, dtypes=["fp32"], tokens=[1])[3:]
    assert [row.contender for row in rows] == [merged.BASE, merged.MERGED, merged.BRANCH]
    assert rows[0].times_copy == 1


@pytest.fixture(scope="module")
def diffusers_rows() -> Any:
    pytest.importorskip("diffusers")
    return bench.load("diffusers").run(**OPTIONS)


def test_swaps_in_a_pipeline_are_timed_beside_diffusers(diffusers_rows: Any) -> None:
    timed = bench.load("diffusers")
    assert [(row.case, row.contender.split()[0]) for row in diffusers_rows] == [
        (timed.COLD, "hotslot"), (timed.COLD, "diffusers"), (timed.COLD, "plain"),
        (timed.WARM, "hotslot"), (timed.WARM, "diffusers"), (timed.WARM, "diffusers"), (timed.WARM, "plain"),
    ]  # fmt: skip
    ms = {row.contender: row.ms for row in diffusers_rows}
    for row in diffusers_rows:
        assert 0 < row.min_ms <= row.ms
        assert row.error == 0
        cold = row.case == timed.COLD
        assert math.isclose(row.times_diffusers * row.ms, ms[timed.HOTSWAP if cold else timed.HOTSWAP_DICT])
        assert math.isclose(row.ms, row.times_copy * ms[timed.READ if cold else timed.COPY])
    layers = 12 + 2 * 5
    assert {row.nbytes for row in diffusers_rows} == {2 * 4 * (2 * layers * 32 + 96 * (4 + 2) + 128 * 2)}


def test_goals_of_swaps_in_a_pipeline(diffusers_rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    timed = bench.load("diffusers")
    assert timed.goals(diffusers_rows) == []
    told = [replace(row, size="18MB") for row in diffusers_rows]
    ms = {row.contender: row.ms for row in told}
    goals = timed.goals(told)
    assert [(goal.found, goal.wanted) for goal in goals] == [
        (ms[timed.ACTIVATE] / ms[timed.COPY], 2),
        (ms[timed.LOAD] / ms[timed.HOTSWAP], 0.2),
    ]
    conditions = report.describe("cpu", rounds=1)
    conditions["versions"]["diffusers"] = "1"
    timed.render(told, conditions, Console(width=200))
    out = capsys.readouterr().out
    assert timed.HOTSWAP in out
    assert goals[1].text in out


def test_a_swap_in_a_pipeline_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    activate = hotslot.Swapper.activate
    monkeypatch.setattr(hotslot.Swapper, "activate", lambda self, name: activate(self, "first"))
    with pytest.raises(HotslotError, match="not those of a fresh load"):
        bench.load("diffusers").run(**OPTIONS)


def test_what_is_not_there() -> None:
    with pytest.raises(
        HotslotError,
        match=r"no such benchmark[\s\S]*one of concurrency, diffusers, forward, merged, scale, slots, soak, swap",
    ):
        bench.load("nonsense")
    with pytest.raises(HotslotError, match=r"No such size[\s\S]*7MB[\s\S]*of tiny, small, 9MB, 84MB"):
        swap.run(["7MB"])


def test_outside_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_FOLDER", tmp_path)
    monkeypatch.setattr(bench, "_PACKAGE", "hotslot_benchmarks_elsewhere")
    with pytest.raises(HotslotError, match=r"clone the repository and run scripts/bench swap"):
        bench.load("swap")


# --- under load, and for long ---------------------------------------------------------------------------------------


def test_swaps_under_load(capsys: pytest.CaptureFixture[str]) -> None:
    bench.run_bench("concurrency", as_json=True, sizes=["tiny"], rounds=2, device="cpu")
    told = json.loads(capsys.readouterr().out)
    assert told["benchmark"] == "concurrency"
    assert [row["way"] for row in told["rows"]] == list(concurrency.WAYS)
    assert told["rows"][-1]["torn_percent"] == 0
    assert all(row["forwards"] and row["swaps_per_second"] for row in told["rows"])
    assert told["costs"][0]["percent_of_unguarded"] > 0


def test_torn_outputs_of_a_guarded_model_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(concurrency.WAYS, concurrency.GUARDED, concurrency.WAYS['hotslot, in_flight="now"'])
    with pytest.raises(HotslotError, match="parts of two adapters"):
        concurrency.run(["tiny"], rounds=4, seconds=0.5, device="cpu")


def test_nothing_grows_over_many_swaps() -> None:
    tenths = soak.soak(5_000)
    assert len(tenths) == 10
    assert tenths[-1].swaps >= 5_000
    assert [text for text in soak.growth(tenths) if "times as long" not in text] == []  # no test of time


def test_what_grows_is_noticed(tmp_path: Path) -> None:
    kept: list[Any] = []
    handles: list[int] = []

    def leak() -> None:
        kept.append(b"x" * (100_000 + len(kept)))  # memory
        kept.append([])  # objects
        if len(handles) < 500:
            handles.append(os.open(tmp_path, os.O_RDONLY))

    try:
        growth = soak.growth(soak.soak(1_000, leak=leak))
    finally:
        for handle in handles:
            os.close(handle)
    for kind in ("memory", "objects", "file handles"):
        assert any(kind in text for text in growth), kind


def test_a_swap_that_takes_longer_and_longer_is_noticed() -> None:
    tenths = [soak.Tenth(i, 0, 0, 0, 100.0 + 5 * i) for i in range(10)]
    assert soak.growth(tenths) == ["a swap takes 1.38 times as long"]
    assert soak.growth([replace(tenth, swap_us=100.0) for tenth in tenths]) == []
