"""A pytest plugin for PEFT's test modules: lets them be imported, puts functions in PEFT's place, reports."""

import builtins
import importlib
import json
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from unittest import mock

import peft.utils.hotswap
import pytest
import torch

from peft_suite import hub

FUNCTIONS = (
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
)
# PEFT's test modules import these at the top, for tests that are not run here (attr: by way of PEFT's corda).
UNUSED_IMPORTS = ("attr", "datasets", "parameterized", "scipy")
GPU_ONLY = "test requires a GPU or XPU"


class PeftSuite:
    """Runs the tests named in `wanted` with the functions of the module `functions`; reports in JSON."""

    def __init__(self, functions: str, wanted: Collection[str], report: Path) -> None:
        self.functions = importlib.import_module(functions)
        self.wanted = wanted
        self.report = report
        self.outcomes: dict[str, dict[str, object]] = {}

    def pytest_sessionstart(self) -> None:
        if hasattr(self.functions, "patch_peft"):
            self.functions.patch_peft()
        else:
            for name in FUNCTIONS:
                setattr(peft.utils.hotswap, name, getattr(self.functions, name))

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        with ExitStack() as stack:
            if isinstance(collector, pytest.Module):
                stack.enter_context(_stand_ins_for_unused_imports())
                if not torch.cuda.is_available():
                    stack.enter_context(_module_for_gpus_lets_itself_be_imported())
            return (yield)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        # PEFT's helper asks the hub about a model's first use, and nobody afterwards.
        helpers = importlib.import_module("tests.testing_utils")
        helpers._HUB_MODEL_ACCESSES.update(dict.fromkeys(hub.MODELS, 0))
        for module in {peft.utils.hotswap, *(item.getparent(pytest.Module).obj for item in items)}:
            for name in set(FUNCTIONS) & set(vars(module)):
                ours = getattr(module, name) is getattr(self.functions, name)
                assert ours, f"{module.__name__}.{name} is not the one of {self.functions.__name__}"

        self.outcomes = {item.name: {"outcome": "not run", "seconds": 0.0, "error": ""} for item in items}
        unwanted = [item for item in items if item.name not in self.wanted]
        config.hook.pytest_deselected(items=unwanted)
        items[:] = [item for item in items if item.name in self.wanted]
        if not torch.cuda.is_available():
            for node in {node for item in items for node in item.listchain()}:
                node.own_markers = [m for m in node.own_markers if m.kwargs.get("reason") != GPU_ONLY]

    def pytest_runtest_setup(self) -> None:
        torch.manual_seed(0)  # some tests draw inputs without a seed, and compare to 1e-5

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seen = self.outcomes[report.nodeid.rpartition("::")[2]]
        seen["seconds"] += report.duration
        if report.when == "call" or not report.passed:
            seen["outcome"] = report.outcome
            seen["error"] += report.longreprtext

    def pytest_sessionfinish(self) -> None:
        self.report.write_text(json.dumps(self.outcomes, indent=1))


def _stand_ins_for_unused_imports() -> AbstractContextManager[object]:
    # Only where PEFT's tests import them: other code must go on seeing that they are not installed.
    real = builtins.__import__

    def scoped(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> object:
        try:
            return real(name, globals, locals, fromlist, level)
        except ModuleNotFoundError as error:
            if (globals or {}).get("__package__") == "tests" and error.name in UNUSED_IMPORTS:
                return mock.MagicMock(name=name)
            raise

    return mock.patch("builtins.__import__", scoped)


def _module_for_gpus_lets_itself_be_imported() -> AbstractContextManager[object]:
    # It skips itself where this function finds no GPU. Its hotswap tests ask another one for their device.
    return mock.patch("accelerate.test_utils.testing.get_backend", return_value=("cuda", 1, lambda: 0))
