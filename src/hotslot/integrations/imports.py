"""Something to do when a module is imported, or at once if it was imported before."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Then = Callable[[ModuleType], None]


def when_imported(name: str, then: Then) -> Callable[[], None]:
    """Call `then(module)` as soon as the module of this name is whole.

    Returns a function that calls it off.
    """
    if name in sys.modules:
        then(sys.modules[name])
        return lambda: None
    watch = _Watch(name, then)
    sys.meta_path.insert(0, watch)

    def call_off() -> None:
        if watch in sys.meta_path:
            sys.meta_path.remove(watch)

    return call_off


class _Watch(MetaPathFinder):
    """Finds one module, once, as the others would, and has its loader tell."""

    def __init__(self, name: str, then: Then) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See importlib."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader, self._then)
        return spec


class _Telling(Loader):
    """A loader that does what it is asked, and tells once the module is executed."""

    def __init__(self, loader: Any, then: Then) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See importlib."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """See importlib."""
        module.__loader__ = self._loader  # nobody else needs to know
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)
