"""The Triton kernels compile for an H100 that is not there, as the library launches them: Triton needs none for that.

`tests/test_kernels.py` runs this file in a process that has Triton. With HOTSLOT_KERNELS=all it takes minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets here, and compiles nothing"
)

from triton import compile as compile_kernel  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hotslot.live import kernels, row_kernel  # noqa: E402

H100 = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 << 10  # that one block may have there
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
_NAMES = {
    F32: "fp32", BF16: "bf16", F16: "fp16",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Recorder:
    """Stands where a kernel is launched, and keeps what it is given."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._arguments: tuple[Any, ...] = ()
        self._options: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self._arguments, self._options = arguments, options

        return launch

    def compiled(self) -> Any:
        """The kernel of the last launch, for an H100; Triton takes pointers to multiples of 16 bytes for such."""
        kernel, names = self._kernel, self._kernel.arg_names
        constants = {name: value for name, value in self._options.items() if name in names}
        signature = {name: f"*{_NAMES[given.dtype]}" for name, given in zip(names, self._arguments, strict=False)}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, given in enumerate(self._arguments) if given.data_ptr() % 16 == 0
        }
        source = ASTSource(
            kernel,
            signature | dict.fromkeys(constants, "constexpr"),
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=aligned,
        )
        options = {name: value for name, value in self._options.items() if name not in names}
        return compile_kernel(source, target=H100, options=options)


def resources(kernel: Any, root: Path) -> dict[str, int]:
    """Registers of a thread (REG), and bytes of what does not fit into them (STACK)."""
    file = root / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    told = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", told)}


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))


def unless_asked(*values: Any) -> Any:
    asked = os.environ.get("HOTSLOT_KERNELS") == "all"
    return pytest.param(*values, marks=pytest.mark.skipif(not asked, reason="takes minutes: HOTSLOT_KERNELS=all"))


# Dtypes of the weight and of A and B, the rank, whether all rows are whole vectors, and whether rows get norms (DoRA).
# What is fast on an H100 takes tensor cores, and fits into registers. The others are right, and slower.
FAST = [
    (BF16, BF16, 16, True, False),
    (BF16, F32, 16, True, False),
    (BF16, BF16, 16, True, True),
    unless_asked(F16, F16, 16, True, False),
    unless_asked(BF16, F16, 16, True, False),
    unless_asked(F16, BF16, 16, True, False),
    unless_asked(F16, F32, 16, True, False),
    unless_asked(BF16, BF16, 32, True, False),
    unless_asked(BF16, BF16, 64, True, False),
    unless_asked(BF16, BF16, 200, True, False),  # in steps of 64
    unless_asked(BF16, F32, 64, True, False),
    unless_asked(BF16, BF16, 32, True, True),
    unless_asked(BF16, BF16, 64, True, True),
    unless_asked(BF16, F32, 16, True, True),
]
SLOW = [
    unless_asked(F32, F32, 16, True, False),
    unless_asked(F32, F32, 64, True, False),
    unless_asked(F32, F32, 16, True, True),
    unless_asked(F32, F32, 64, True, True),
    unless_asked(F32, F32, 3, False, False),
    unless_asked(BF16, BF16, 3, False, False),
    unless_asked(F16, F16, 100, False, False),
    unless_asked(BF16, BF16, 100, False, True),
    unless_asked(BF16, F32, 100, False, True),
    unless_asked(BF16, F32, 64, True, True),
]


def merged(
    monkeypatch: pytest.MonkeyPatch, weight: torch.dtype, factors: torch.dtype, rank: int, whole: bool, dora: bool
) -> Any:
    """The kernel that `Sums` launches for one such weight."""
    name = "_add_and_scale_rows" if dora else "_add"
    recorder = Recorder(getattr(kernels, name))
    monkeypatch.setattr(kernels, name, recorder)
    columns = 256 if whole else 257
    own, left, right = torch.zeros(64, columns), torch.zeros(64, rank), torch.zeros(rank, columns)
    term = kernels.Term(left.to(factors), right.to(factors), 0.5, torch.ones(64) if dora else None)
    kernels.Sums([term]).write([own.to(weight)], [own.to(weight)])
    return recorder.compiled()


@pytest.mark.parametrize(("weight", "factors", "rank", "whole", "dora"), FAST)
def test_merges_with_tensor_cores_and_in_registers(
    weight: torch.dtype, factors: torch.dtype, rank: int, whole: bool, dora: bool,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    kernel = merged(monkeypatch, weight, factors, rank, whole, dora)
    assert "wgmma" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED_BYTES
    assert resources(kernel, tmp_path)["STACK"] == 0


@pytest.mark.parametrize(("weight", "factors", "rank", "whole", "dora"), SLOW)
def test_merges_of_what_is_odd(
    weight: torch.dtype, factors: torch.dtype, rank: int, whole: bool, dora: bool,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    kernel = merged(monkeypatch, weight, factors, rank, whole, dora)
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_BYTES
    print(f"{resources(kernel, tmp_path)}, {kernel.metadata.shared} bytes shared")


WORDS = [(word, word) for word in (torch.int64, torch.int32, torch.int16, torch.int8)]
CONVERTED = [(F32, BF16), (BF16, F32), (F32, F16), (F16, F32), (BF16, F16), (F16, BF16)]
COPIES = [WORDS[0], CONVERTED[0], *(unless_asked(*pair) for pair in (*WORDS[1:], *CONVERTED[1:]))]


@pytest.mark.parametrize(("source", "target"), COPIES)
def test_rows_are_copied_and_converted(
    source: torch.dtype, target: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recorder = Recorder(row_kernel._copy_rows)
    monkeypatch.setattr(row_kernel, "_copy_rows", recorder)
    row_kernel.compile_for(torch.zeros(64, dtype=source), torch.zeros(64, dtype=target))
    assert resources(recorder.compiled(), tmp_path)["STACK"] == 0
