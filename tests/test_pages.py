"""Host memory in huge pages: whose it is, and that the system gives them where it has them."""

import mmap
import multiprocessing
import re
from pathlib import Path

import pytest
import torch

from hotslot import pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HAS_HUGE_PAGES = SETTING.exists() and "[never]" not in SETTING.read_text()


def huge_bytes(tensor: torch.Tensor) -> int:
    """How much of the mapping in which the tensor begins is in huge pages now."""
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        low, _, high = mapping.split(" ", 1)[0].partition("-")
        if high and int(low, 16) <= tensor.data_ptr() < int(high, 16):
            return 1024 * int(re.search(r"AnonHugePages:\s+(\d+) kB", mapping)[1])
    raise AssertionError("nowhere")


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="a system without huge pages")
def test_large_memory_is_in_huge_pages() -> None:
    nbytes = 3 * pages.HUGE_BYTES + 12_345
    ours, torchs = pages.empty(nbytes).fill_(1), torch.empty(nbytes, dtype=torch.uint8).fill_(1)
    assert ours.numel() == nbytes
    assert ours.untyped_storage().nbytes() == nbytes
    assert huge_bytes(ours) >= 2 * pages.HUGE_BYTES, "or memory is too scattered for any"
    if "[always]" not in SETTING.read_text():
        assert huge_bytes(torchs) == 0


def test_memory_outlives_who_asked_for_it() -> None:
    view = pages.empty(3 * pages.HUGE_BYTES).fill_(7)[-5:]
    assert view.tolist() == [7] * 5


@pytest.mark.parametrize("nbytes", [0, 1, pages.HUGE_BYTES - 1, pages.HUGE_BYTES])
def test_any_size(nbytes: int) -> None:
    memory = pages.empty(nbytes)
    assert (memory.dtype, memory.shape, memory.device.type) == (torch.uint8, (nbytes,), "cpu")
    assert not memory.fill_(1).logical_not().any()


@pytest.mark.parametrize("missing", ["the call", "the kernel's"])
def test_without_huge_pages_it_is_torchs_own(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "the call":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)  # EINVAL, as of a kernel built without them
    assert pages.empty(2 * pages.HUGE_BYTES).fill_(3).sum() == 3 * 2 * pages.HUGE_BYTES


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="a system without huge pages")
def test_only_so_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * pages.HUGE_BYTES
    monkeypatch.setattr(pages, "MAX_MAPPINGS", len(pages._mappings) + 1)
    first, second = pages.empty(size).fill_(1), pages.empty(size).fill_(1)
    assert huge_bytes(first) > 0 == huge_bytes(second)
    del first  # and with it its mapping
    assert huge_bytes(pages.empty(size).fill_(1)) > 0


def _write(memory: torch.Tensor) -> None:
    memory.fill_(2)


def test_a_fork_writes_its_own() -> None:
    memory = pages.empty(2 * pages.HUGE_BYTES).fill_(1)
    child = multiprocessing.get_context("fork").Process(target=_write, args=(memory,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert memory.eq(1).all()
