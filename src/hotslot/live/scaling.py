"""`layer.scaling`: a map whose values live in the arena, and writing into PEFT's own."""

from __future__ import annotations

from typing import Any

import torch


class ScalingMap(dict[str, Any]):
    """adapter_name → scaling, as PEFT's own dict; the slot's value is a 0-dim view of the arena.

    PEFT assigns floats (`set_scale`) and products (`scale_layer`): to the slot's name they are written into the view,
    which compiled code reads, so that nothing recompiles and the next swap finds its scaling where it left it.

    A copy or a pickle of the layer gets a plain dict of floats: it is a layer of its own, with no arena behind it.
    """

    def __init__(self, values: dict[str, Any], adapter_name: str, view: torch.Tensor) -> None:
        super().__init__(values)
        super().__setitem__(adapter_name, view)
        self._views = {adapter_name: view}

    def bind(self, adapter_name: str, view: torch.Tensor) -> None:
        """Let `view` hold the scaling of one more adapter, or hold it elsewhere."""
        self._views[adapter_name] = view
        super().__setitem__(adapter_name, view)

    def release(self, adapter_name: str, *, like: Any) -> None:
        """Let the dict hold this adapter's scaling itself again: as a tensor if `like` is one, else as a float."""
        view = self._views.get(adapter_name)
        if view is not None and self._holds(adapter_name, view):
            if isinstance(like, torch.Tensor):
                super().__setitem__(adapter_name, view.clone())
            else:  # the view holds it in single precision: the float it came from, if it is still that one
                same = like is not None and float(torch.tensor(like, dtype=view.dtype, device="cpu")) == float(view)
                super().__setitem__(adapter_name, like if same else float(view))
        self._views.pop(adapter_name, None)  # last: a call that was broken off may be repeated

    @property
    def bound(self) -> bool:
        """Whether any value still lives in an arena."""
        return bool(self._views)

    def __setitem__(self, adapter_name: str, value: Any) -> None:
        view = self._views.get(adapter_name)
        if view is None or not self._holds(adapter_name, view):
            super().__setitem__(adapter_name, value)
        elif value is not view:  # `scaling[name] *= 2` has already multiplied in place
            with torch.inference_mode(False), torch.no_grad():
                view.fill_(float(value))

    def _holds(self, adapter_name: str, view: torch.Tensor) -> bool:
        """Whether the name is still that of the slot: PEFT may have deleted it, and loaded another adapter under it."""
        return adapter_name in self and self[adapter_name] is view

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As dict's, each value through `__setitem__`."""
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __ior__(self, other: Any) -> ScalingMap:  # type: ignore[override,misc]
        self.update(other)
        return self

    def copy(self) -> ScalingMap:
        """Another map over the same views: PEFT puts a copy back after `rescale_adapter_scale`."""
        twin = ScalingMap.__new__(ScalingMap)
        dict.update(twin, self)
        twin._views = self._views
        return twin

    def plain(self) -> dict[str, Any]:
        """The same scalings as floats."""
        return {name: float(value) if isinstance(value, torch.Tensor) else value for name, value in self.items()}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.plain(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return self.plain()


def set_scaling(scaling: dict[str, Any], name: str, value: float) -> None:
    """As PEFT would: a tensor stays that tensor, and what is equal stays untouched, for compiled code may guard it."""
    current = scaling[name]
    if isinstance(current, torch.Tensor):
        current.fill_(value)
    elif current != value:
        scaling[name] = value


def put_back_scaling(scaling: dict[str, Any], name: str, saved: Any) -> None:
    """Let it be a number or a tensor that was there before; a tensor stays that tensor."""
    current = scaling.get(name)
    if isinstance(current, torch.Tensor):
        current.copy_(torch.as_tensor(saved, device="cpu"))
    elif current != saved:
        scaling[name] = saved
