"""The Triton kernels on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run_with_triton(*files: str, interpreted: bool) -> str:
    """pytest's output of these, in a process of its own: Triton is not on the path here, and asks when imported."""
    if torch.cuda.is_available():
        pytest.skip("tests/gpu runs on the GPU")
    triton = Path(sys.prefix, "triton")  # where scripts/install puts it
    if not triton.is_dir():
        pytest.skip(f"no Triton in {triton}; scripts/install puts it there")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *files]
    path = os.pathsep.join([str(triton), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpreted)), "PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == pytest.ExitCode.OK, done.stdout[-4000:]
    assert "passed" in done.stdout
    return done.stdout


def test_kernels_in_the_interpreter() -> None:
    files = ("gpu/test_arrival.py", "gpu/test_kernels.py", "gpu/test_scatter.py")
    assert "needs a GPU, or" not in run_with_triton(*files, interpreted=True)


def test_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    assert "compiles nothing" not in run_with_triton("gpu/test_compilation.py", interpreted=False)
