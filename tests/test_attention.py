"""nn.MultiheadAttention: every forward, in any thread, computes what PEFT's first one does, and changes nothing.

PEFT adds the delta to the base weights before each forward and subtracts it after, so that only its first is exact:
each comparison is with an oracle of its own.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import MultiheadAttention as PeftMultiheadAttention
from torch import Tensor, nn

import hotslot
from adapters import expected_peft_warnings, make_adapter
from hotslot.testing import same_addresses
from oracle import assert_same_output, assert_unchanged, error, fresh, snapshot
from zoo import HIDDEN, ZOO, Entry

LENGTH, BATCH, HEADS = 5, 3, 4


class Attend(nn.Module):
    """One attention layer, called as the test says."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, **options)

    def forward(self, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return self.attention(*args, **kwargs)


def _entry(**options: Any) -> Entry:
    return Entry(
        "attend", partial(Attend, **options), lambda generator, dtype: {}, lambda result: result[0], ("attention",)
    )


def _tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _self_attention(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    (x,) = _tensors((BATCH, LENGTH, HIDDEN), dtype=dtype)
    return x, x, x


def _adapter(folder: Path, entry: Entry, seed: int = 1, **config: Any) -> Path:
    return make_adapter(
        folder, entry, seed=seed, **{"r": 4, "lora_alpha": 6, "target_modules": ["attention"], **config}
    )


def _attached(entry: Entry, folder: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen base with the adapter live in a slot of its own size."""
    model = entry.build(dtype=dtype).requires_grad_(False)
    hotslot.attach(model, adapters={"new": folder}).activate("new")
    return model


def _assert_equal(got: tuple[Tensor, Tensor | None], want: tuple[Tensor, Tensor | None], *, exact: bool = True) -> None:
    assert_same_output(got[0].detach(), want[0].detach(), exact=exact)
    assert (got[1] is None) == (want[1] is None)
    if got[1] is not None and want[1] is not None:
        assert_same_output(got[1].detach(), want[1].detach(), exact=exact)


# --- what is computed -----------------------------------------------------------------------------------------------


_PADDED = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
_BOOL_MASK = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
_FLOAT_MASK = torch.linspace(-2, 2, LENGTH * LENGTH).view(LENGTH, LENGTH)

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "boolean mask": {"attn_mask": _BOOL_MASK},
    "float mask": {"attn_mask": _FLOAT_MASK, "need_weights": False},
    "mask of each head": {"attn_mask": _FLOAT_MASK.expand(BATCH * HEADS, -1, -1)},
    "padding": {"key_padding_mask": _PADDED},
    "padding and mask": {"key_padding_mask": _PADDED, "attn_mask": _BOOL_MASK, "need_weights": False},
    "causal": {"attn_mask": _BOOL_MASK, "is_causal": True, "need_weights": False},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_forward_is_pefts_first_forward(call: str, batch_first: bool, tmp_path: Path) -> None:
    """Bit for bit, attention weights included; with gradients on and off, which take different kernels."""
    entry = _entry(batch_first=batch_first)
    folder = _adapter(tmp_path, entry)
    inputs = _self_attention()
    if not batch_first:
        inputs = (inputs[0].transpose(0, 1),) * 3
    model = _attached(entry, folder)
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            _assert_equal(model(*inputs, **CALLS[call]), fresh(entry, folder)(*inputs, **CALLS[call]))


def _cross(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(_tensors((BATCH, LENGTH, HIDDEN), (BATCH, 7, HIDDEN), (BATCH, 7, HIDDEN), dtype=dtype))


def _unbatched(dtype: torch.dtype) -> tuple[Tensor, ...]:
    (x,) = _tensors((LENGTH, HIDDEN), dtype=dtype)
    return x, x, x


INPUTS = {"self": _self_attention, "cross": partial(_cross, torch.float32)}  # they take different kernels


@pytest.mark.parametrize("make_inputs", [_self_attention, _cross, _unbatched])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}],
    ids=["plain", "without bias", "with bias_kv", "with zero attention"],
)
def test_every_kind_of_layer_and_input(
    options: dict[str, Any], dtype: torch.dtype, make_inputs: Callable[..., tuple[Tensor, ...]], tmp_path: Path
) -> None:
    entry = _entry(batch_first=True, **options)
    folder = _adapter(tmp_path, entry, use_rslora=True)
    inputs = make_inputs(dtype)
    model = _attached(entry, folder, dtype=dtype)
    with torch.no_grad():
        _assert_equal(model(*inputs), fresh(entry, folder, dtype=dtype)(*inputs))


@pytest.mark.parametrize(
    "config",
    [{"r": 1}, {"r": 8, "lora_alpha": 2.5}, {"use_rslora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}],
    ids=", ".join,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_adapter(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    entry, inputs = _entry(batch_first=True), _self_attention(dtype)
    folder = _adapter(tmp_path, entry, **config)
    model = _attached(entry, folder, dtype=dtype)
    with torch.no_grad():
        base, got = entry.build(dtype=dtype)(*inputs), model(*inputs)
        _assert_equal(got, fresh(entry, folder, dtype=dtype)(*inputs))
    assert error(got[0], base[0]) > 0.01  # the control: the adapter does something


@pytest.mark.parametrize("kind", INPUTS)
def test_a_trainable_base_stays_exact_in_the_neutral_state_and_close_in_others(kind: str, tmp_path: Path) -> None:
    """torch's linear takes another kernel for a weight that wants a gradient."""
    entry, inputs = _entry(batch_first=True), INPUTS[kind]()
    folder = _adapter(tmp_path, entry)
    model = entry.build()  # as it was made: its weights want gradients
    swapper = hotslot.attach(model, adapters={"new": folder})
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _assert_equal(model(*inputs), entry.build()(*inputs))
            with swapper.using("new"):
                _assert_equal(model(*inputs), fresh(entry, folder)(*inputs), exact=False)
            _assert_equal(model(*inputs), entry.build()(*inputs))


def test_swaps_between_adapters_of_other_ranks(tmp_path: Path) -> None:
    """A padded matmul rounds otherwise; back in the neutral state not a bit is left."""
    entry = ZOO["attention"]
    configs = {"small": {"r": 2}, "large": {"r": 8, "use_rslora": True}, "biased": {"r": 3, "lora_bias": True}}
    folders = {
        name: make_adapter(tmp_path / name, entry, seed=i, target_modules=list(entry.targets), **config)
        for i, (name, config) in enumerate(configs.items())
    }
    inputs, model = entry.inputs(), entry.build().requires_grad_(False)
    swapper = hotslot.attach(model, adapters=folders)
    base = entry.output(entry.build().requires_grad_(False), inputs)
    for name in ("large", "small", "biased", "small", "large"):
        swapper.activate(name)
        assert_same_output(entry.output(model, inputs), entry.output(fresh(entry, folders[name]), inputs))
        swapper.deactivate()
        assert torch.equal(entry.output(model, inputs), base)


def test_two_adapters_active_at_once(tmp_path: Path) -> None:
    entry = _entry(batch_first=True)
    one, two, three = (_adapter(tmp_path / str(i), entry, seed=i) for i in range(3))

    def pair(first: Path) -> nn.Module:
        model = fresh(entry, first)
        model.load_adapter(str(two), adapter_name="other")
        model.base_model.set_adapter(["default", "other"])
        return model.requires_grad_(False)

    model = pair(one)
    hotslot.attach(model, adapters={"new": three}).activate("new")
    with torch.no_grad(), warnings.catch_warnings():
        got = model(*_self_attention())
        warnings.filterwarnings("ignore", message="Already following adapters were merged")  # PEFT's, of itself
        _assert_equal(got, pair(three)(*_self_attention()))


# --- nothing is changed by it ---------------------------------------------------------------------------------------


def _base_weights(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Without `named_modules`, at which PEFT registers Parameters anew."""
    layer = model.base_model.model.attention if hasattr(model, "base_model") else model.attention
    base = layer.get_base_layer()
    return base.in_proj_weight, base.out_proj.get_base_layer().weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_hundred_forwards_change_no_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    entry, inputs = _entry(batch_first=True), _self_attention(dtype)
    model = _attached(entry, _adapter(tmp_path, entry), dtype=dtype)
    weights, before = _base_weights(model), snapshot(model)
    with same_addresses(model), torch.no_grad():
        first = model(*inputs)
        for _ in range(200):
            last = model(*inputs)
    _assert_equal(last, first)
    assert error(first[0], entry.build(dtype=dtype)(*inputs)[0].detach()) > 0.01  # the control: the adapter is live
    assert_unchanged(before, snapshot(model))
    assert all(now is then for now, then in zip(_base_weights(model), weights, strict=True))


def test_pefts_own_forwards_drift(tmp_path: Path) -> None:
    """The control."""
    entry, inputs = _entry(batch_first=True), _self_attention(torch.bfloat16)
    model = fresh(entry, _adapter(tmp_path, entry), dtype=torch.bfloat16)
    objects = _base_weights(model)
    weights = [weight.detach().clone() for weight in objects]
    with torch.no_grad():
        first = model(*inputs)
        for _ in range(200):
            last = model(*inputs)
    assert not any(torch.equal(now, then) for now, then in zip(_base_weights(model), weights, strict=True))
    assert not any(now is then for now, then in zip(_base_weights(model), objects, strict=True))
    assert error(last[0], first[0]) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_adapters_stay_where_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT's `get_delta_weight` gives them other memory on a CPU, at every forward."""
    entry = _entry(batch_first=True)
    folder = _adapter(tmp_path, entry, file_dtype=dtype)
    inputs = _self_attention(dtype)

    def load() -> nn.Module:
        return fresh(entry, folder, dtype=dtype, autocast_adapter_dtype=False).requires_grad_(False)

    model = load()
    swapper = hotslot.attach(model, adapters={"new": folder})
    swapper.activate("new")
    with torch.no_grad(), same_addresses(model):
        _assert_equal(model(*inputs), load()(*inputs))
        swapper.deactivate()
        _assert_equal(model(*inputs), entry.build(dtype=dtype).requires_grad_(False)(*inputs))
        swapper.activate("new")
        _assert_equal(model(*inputs), load()(*inputs))
    assert model.base_model.model.attention.lora_A["default"].weight.dtype == dtype


def test_listing_modules_and_saving_replace_no_parameter(tmp_path: Path) -> None:
    entry = _entry(batch_first=True)
    folder = _adapter(tmp_path, entry)
    model = fresh(entry, folder)
    objects = _base_weights(model)
    list(model.modules())
    assert not any(now is then for now, then in zip(_base_weights(model), objects, strict=True))  # the control
    hotslot.attach(model)
    objects = _base_weights(model)
    with same_addresses(model):
        list(model.modules())
        model(*_self_attention())
        model.state_dict()
        model.save_pretrained(tmp_path / "saved")
    assert all(now is then for now, then in zip(_base_weights(model), objects, strict=True))


def test_detach_leaves_the_layer_as_it_was(tmp_path: Path) -> None:
    entry = _entry(batch_first=True)
    folder = _adapter(tmp_path, entry)
    plain = entry.build()
    before = snapshot(plain)
    swapper = hotslot.attach(plain, adapters={"new": folder})
    swapper.activate("new")
    plain(*_self_attention())
    swapper.detach()
    assert_unchanged(before, snapshot(plain))
    model = fresh(entry, folder)
    hotslot.attach(model).detach()
    assert type(model.base_model.model.attention) is PeftMultiheadAttention


def test_pefts_own_calls_still_merge_and_unload(tmp_path: Path) -> None:
    entry = _entry(batch_first=True)
    one, two = (_adapter(tmp_path / str(i), entry, seed=i) for i in range(2))
    inputs = _self_attention()
    model = fresh(entry, one)
    hotslot.attach(model, adapters={"new": two}).activate("new")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*lready (un)?merged"
        )  # PEFT's, of out_proj: it takes care of it twice
        with model.disable_adapter():
            _assert_equal(model(*inputs), entry.build().requires_grad_(False)(*inputs))
        model.merge_adapter()
        _assert_equal(model(*inputs), _merged(entry, two)(*inputs))
        model.unmerge_adapter()
        assert_same_output(model(*inputs)[0], fresh(entry, two)(*inputs)[0])
        _assert_equal(fresh(entry, two).merge_and_unload()(*inputs), model.merge_and_unload()(*inputs))


def _merged(entry: Entry, folder: Path) -> nn.Module:
    model = fresh(entry, folder)
    model.merge_adapter()
    return model


# --- threads --------------------------------------------------------------------------------------------------------


class Schedule:
    """Calls `call` in `count` threads: all are inside of nn.MultiheadAttention's forward before the first goes on, and
    each goes on when the one before it has returned. `results`: what they returned or raised.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, call: Callable[[], Any]) -> None:
        self.results: list[Any] = []
        self._inside, self._go = threading.Semaphore(0), [threading.Event() for _ in range(count)]
        self._index, self._call = threading.local(), call
        forward = nn.MultiheadAttention.forward

        def waiting(*args: Any, **kwargs: Any) -> Any:
            self._inside.release()
            assert self._go[self._index.value].wait(30)
            return forward(*args, **kwargs)

        threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]
        with monkeypatch.context() as patch:
            patch.setattr(nn.MultiheadAttention, "forward", waiting)
            for thread in threads:
                thread.start()
                assert self._inside.acquire(timeout=30)
            for thread, go in zip(threads, self._go, strict=True):
                go.set()
                thread.join()

    def _run(self, index: int) -> None:
        self._index.value = index
        try:
            with torch.no_grad():
                self.results.append(self._call())
        except Exception as error:
            self._inside.release()
            self.results.append(error)


@pytest.mark.parametrize("kind", INPUTS)
def test_four_threads_inside_one_forward_each_compute_the_adapter(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, inputs = _entry(batch_first=True), INPUTS[kind]()
    folder = _adapter(tmp_path, entry)
    with torch.no_grad():
        want = fresh(entry, folder)(*inputs)
    model = _attached(entry, folder)
    results = Schedule(monkeypatch, 4, lambda: model(*inputs)).results
    assert len(results) == 4
    for result in results:
        _assert_equal(result, want)


@pytest.mark.parametrize("kind", INPUTS)
def test_four_threads_inside_pefts_forward_do_not(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the first to return takes the adapter out of the base weights."""
    entry, inputs = _entry(batch_first=True), INPUTS[kind]()
    folder = _adapter(tmp_path, entry)
    with torch.no_grad():
        want = fresh(entry, folder)(*inputs)[0]
    model = fresh(entry, folder)
    results = Schedule(monkeypatch, 4, lambda: model(*inputs)).results
    assert torch.equal(results[0][0], want)
    for result in results[1:]:
        assert isinstance(result, Exception) or error(result[0], want) > 0.01


def _in_threads(count: int, call: Callable[[], Any]) -> list[Any]:
    """What `call` returned or raised in each thread."""
    results: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad():
                results.append(call())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_that_run_freely(tmp_path: Path) -> None:
    """On the kernel for self-attention too, switching as often as Python can."""
    entry = _entry(batch_first=True)
    folder, inputs = _adapter(tmp_path, entry), _self_attention()
    model = _attached(entry, folder)
    with torch.no_grad():
        want = fresh(entry, folder)(*inputs)[0]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        results = _in_threads(4, lambda: all(torch.equal(model(*inputs)[0], want) for _ in range(50)))
    finally:
        sys.setswitchinterval(interval)
    assert results == [True] * 4


# --- training -------------------------------------------------------------------------------------------------------


def _gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    torch.manual_seed(0)  # of the dropout
    output, weights = model(*inputs)
    assert weights is not None
    (output.square().sum() + weights.square().sum()).backward()
    return {name.partition("attention.")[2]: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_gradients_in_training_are_pefts(lora_bias: bool, dropout: float, tmp_path: Path) -> None:
    entry = _entry(batch_first=True, dropout=dropout)
    folder = _adapter(tmp_path, entry, lora_bias=lora_bias)

    def load() -> nn.Module:
        model = fresh(entry, folder).train()
        for name, param in model.named_parameters():
            param.requires_grad_("lora_" in name)
        return model

    want = _gradients(load(), _self_attention())
    assert {"lora_A.default.weight", "lora_B.default.weight"} <= want.keys()
    assert {"base_layer.out_proj.lora_A.default.weight", "base_layer.out_proj.lora_B.default.weight"} <= want.keys()
    assert all(gradient.abs().max() > 0 for gradient in want.values())
    model = load()
    swapper = hotslot.attach(model, adapters={"new": folder})
    for param in (param for name, param in model.named_parameters() if "lora_" in name):
        param.data.zero_()
    swapper.deactivate()
    swapper.activate("new")
    got = _gradients(model, _self_attention())
    assert got.keys() == want.keys()
    for name in want:
        assert_same_output(got[name], want[name])


def test_a_swap_between_forward_and_backward_is_noticed(tmp_path: Path) -> None:
    """Autograd would compute with the new adapter's values, in silence."""
    entry = _entry(batch_first=True)
    one, two = (_adapter(tmp_path / str(i), entry, seed=i) for i in range(2))
    model = fresh(entry, one)
    swapper = hotslot.attach(model, adapters={"new": two})
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    loss = model(*_self_attention())[0].square().sum()
    swapper.activate("new")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(*_self_attention())[0].square().sum().backward()  # the control


def test_training_by_hand_reaches_the_same_weights_as_peft(tmp_path: Path) -> None:
    """Ten steps of an optimizer on a PEFT model, without and with a swapper."""
    entry = _entry(batch_first=True)

    def train(attached: bool, steps: int = 10) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]), expected_peft_warnings():
            torch.manual_seed(0)
            config = LoraConfig(r=4, target_modules=["attention"], init_lora_weights=False)
            model = get_peft_model(entry.build(), config).train()
        if attached:
            hotslot.attach(model)
        params = {name: param for name, param in model.named_parameters() if "lora_" in name}
        optimizer = torch.optim.SGD(params.values(), lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            model(*_self_attention())[0].square().mean().backward()
            optimizer.step()
        return {name: param.detach().clone() for name, param in params.items()}

    start, want, got = train(False, steps=0), train(False), train(True)
    assert want.keys() == got.keys()
    for name in want:
        assert not torch.equal(want[name], start[name])
        assert_same_output(got[name], want[name])
