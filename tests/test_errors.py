"""The error tree is what its docstring draws, errors survive a pickle, and no foreign exception comes through."""

from __future__ import annotations

import ast
import copy
import errno
import importlib
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest
from torch import nn

import hotslot
from adapters import make_adapter
from hotslot import checkpoint, errors
from oracle import assert_unchanged, fresh, snapshot
from zoo import ZOO

CLASSES: dict[str, type[errors.HotslotError]] = {name: getattr(errors, name) for name in errors.__all__}
SOURCE = Path(errors.__file__).parent


# -- the tree -----------------------------------------------------------------------------------------------------


def drawn() -> dict[str, tuple[str | None, set[str]]]:
    """Class → (parent, builtin bases), of the drawing in the docstring."""
    assert errors.__doc__
    tree: dict[str, tuple[str | None, set[str]]] = {}
    path: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        match = re.fullmatch(r"(?P<branch>[ │├└─]*)(?P<name>[A-Z]\w+Error)\b *(?:\(also (?P<also>\w+)\))?.*", line)
        if match is None or not line.startswith("    "):
            continue
        depth = len(match["branch"])
        while path and path[-1][0] >= depth:
            path.pop()
        also = {match["also"]} if match["also"] else set()
        tree[match["name"]] = (path[-1][1] if path else None, also)
        path.append((depth, match["name"]))
    return tree


def test_every_exception_is_exported_and_drawn() -> None:
    defined = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, BaseException)
    }
    assert defined == set(errors.__all__)
    assert errors.__all__ == sorted(errors.__all__)
    assert set(drawn()) == defined


@pytest.mark.parametrize("name", CLASSES)
def test_bases_are_those_in_the_drawing(name: str) -> None:
    parent, also = drawn()[name]
    bases = {base.__name__ for base in CLASSES[name].__bases__}
    assert bases == {parent or "Exception", *also}
    assert (CLASSES[name].__doc__ or "").strip()


def test_every_exception_of_the_package_is_in_the_tree() -> None:
    """Nothing else that hotslot defines is raised: whoever catches HotslotError catches all."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and re.search(r"(Error|Exception|Warning)$", node.name):
                found[node.name] = path.relative_to(SOURCE).as_posix()
    outside = {name: path for name, path in found.items() if path != "errors.py"}
    assert set(found) - set(outside) == set(errors.__all__)
    # An assertion failed in a user's own tests is no refusal; the command line has an exit code.
    assert set(outside.values()) <= {"testing.py"} | {path for path in outside.values() if path.startswith("cli/")}


# -- one error ----------------------------------------------------------------------------------------------------

PARTS = {"where": "model.layers.0", "found": (4, 8), "expected": "(8, 4) by the base layer", "hint": "load another"}


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_message_and_attributes(cls: type[errors.HotslotError]) -> None:
    raised = cls("It does not fit.", **PARTS)
    assert str(raised) == (
        "It does not fit.\n"
        "  where: model.layers.0\n"
        "  found: (4, 8)\n"
        "  expected: (8, 4) by the base layer\n"
        "  next step: load another"
    )
    assert {name: getattr(raised, name) for name in PARTS} == PARTS
    assert raised.summary == "It does not fit."
    assert str(cls("No more.")) == "No more."
    assert str(cls("No more.", found=0)) == "No more.\n  found: 0"  # zero is something that was found


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_a_pickle_and_a_copy(cls: type[errors.HotslotError], protocol: int) -> None:
    """They cross process boundaries: a data loader's, a pool's, Ray's."""
    raised = cls("It does not fit.", **PARTS)
    for again in (pickle.loads(pickle.dumps(raised, protocol)), copy.copy(raised), copy.deepcopy(raised)):
        assert type(again) is cls
        assert str(again) == str(raised)
        assert {name: getattr(again, name) for name in ("summary", *PARTS)} == {"summary": raised.summary, **PARTS}


def test_peft_and_its_callers_catch_them_as_before() -> None:
    """diffusers and transformers catch ValueError and RuntimeError around PEFT's functions."""
    assert issubclass(errors.UnexpectedTargetError, RuntimeError)
    for cls in (errors.UnsupportedError, errors.MergedError, errors.CheckpointError):
        assert issubclass(cls, ValueError)
    assert issubclass(errors.AdapterNotFoundError, FileNotFoundError)
    assert issubclass(errors.UnknownAdapterError, KeyError)


# -- foreign exceptions -------------------------------------------------------------------------------------------

MLP = ZOO["mlp"]


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "sound", MLP, seed=0, r=2, target_modules=["up"])


Entry = Callable[[nn.Module, Any], Any]

# Public entry points that take an adapter from outside: each on a model that it is for.
ENTRIES: dict[str, tuple[bool, Entry]] = {
    "attach": (False, lambda model, source: hotslot.attach(model, {"new": source})),
    "Swapper.load": (True, lambda model, source: hotslot.attach(model).load("new", source)),
    "hotswap_adapter": (True, lambda model, source: hotslot.hotswap_adapter(model, source, "default")),
}


def test_no_entry_point_is_forgotten() -> None:
    """Whatever is public and takes a source stands above. (`fits` answers, and raises nothing.)"""
    takes_source = {"source", "adapters", "model_name_or_path"}
    functions = {name: getattr(hotslot, name) for name in hotslot.__all__}
    functions |= {f"Swapper.{name}": f for name, f in vars(hotslot.Swapper).items() if not name.startswith("_")}
    found = {
        name
        for name, f in functions.items()
        if inspect.isfunction(f) and takes_source & set(inspect.signature(f).parameters)
    }
    assert found - {"Swapper.fits"} == set(ENTRIES)


def _raising(error: BaseException, only_for: Callable[..., bool] = lambda *args: True, otherwise: Any = None) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if only_for(*args):
            raise error
        return otherwise(*args, **kwargs)

    return call


def _of_the_adapter(path: Any, *args: Any) -> bool:
    return "sound" in os.fspath(path) if isinstance(path, (str, os.PathLike)) else False


OS_ERRORS = [
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EIO, "Input/output error"),
    FileNotFoundError(errno.ENOENT, "gone meanwhile"),
    IsADirectoryError(errno.EISDIR, "Is a directory"),
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.ESTALE, "Stale file handle"),
]

# Where the file system is asked. Each name is checked to be reached, or this table has grown stale.
FILE_SYSTEM: dict[str, Callable[[pytest.MonkeyPatch, BaseException], None]] = {
    "os.open": lambda patch, error: patch.setattr(os, "open", _raising(error, _of_the_adapter, os.open)),
    "os.preadv": lambda patch, error: patch.setattr(os, "preadv", _raising(error)),
}


@pytest.mark.parametrize("call", FILE_SYSTEM)
@pytest.mark.parametrize("error", OS_ERRORS, ids=lambda error: errno.errorcode[error.errno])
@pytest.mark.parametrize("entry", ENTRIES)
def test_file_system_errors_are_mapped(
    entry: str, error: OSError, call: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_peft, enter = ENTRIES[entry]
    first = make_adapter(tmp_path / "first", MLP, seed=1, r=2, target_modules=["up"])
    model = fresh(MLP, first) if on_peft else MLP.build()
    before = snapshot(model) if entry == "hotswap_adapter" else None
    with monkeypatch.context() as patch:
        FILE_SYSTEM[call](patch, error)
        with pytest.raises(errors.HotslotError) as caught:
            enter(model, str(sound))
    assert error.strerror in str(caught.value)
    assert caught.value.__cause__ is error
    if before is not None:
        assert_unchanged(before, snapshot(model))
    hotslot.hotswap_adapter(fresh(MLP, first), str(sound), "default")  # the control: without the fault it is taken


# Exceptions of huggingface_hub that its download of a file cannot raise, and why.
NOT_OF_A_DOWNLOAD = {
    "BucketBatchError": "uploads to buckets",
    "BucketNotFoundError": "buckets",
    "CLIError": "its command line",
    "CLIExtensionInstallError": "its command line",
    "CacheNotFound": "scanning the cache",
    "CachedRepoTreeNotFoundError": "listing a repository",
    "ConfirmationError": "its command line",
    "CorruptedCacheException": "scanning the cache",
    "DDUFCorruptedFileError": "DDUF files",
    "DDUFError": "DDUF files",
    "DDUFExportError": "DDUF files",
    "DDUFInvalidEntryNameError": "DDUF files",
    "DeviceCodeError": "logging in",
    "DryRunError": "dry runs",
    "FileDuplicationError": "copying between repositories",
    "GenerationError": "inference",
    "HfUriError": "URIs of the file system",
    "IncompleteGenerationError": "inference",
    "InferenceEndpointError": "inference",
    "InferenceEndpointTimeoutError": "inference",
    "InferenceTimeoutError": "inference",
    "JobNotFoundError": "jobs",
    "NotASafetensorsRepoError": "reading metadata",
    "OIDCError": "logging in",
    "OverloadedError": "inference",
    "RevisionResolutionError": "asking for a revision alone",
    "SafetensorsParsingError": "reading metadata",
    "SandboxCommandError": "sandboxes",
    "SandboxError": "sandboxes",
    "StrictDataclassClassValidationError": "its own dataclasses",
    "StrictDataclassDefinitionError": "its own dataclasses",
    "StrictDataclassError": "its own dataclasses",
    "StrictDataclassFieldValidationError": "its own dataclasses",
    "TextGenerationError": "inference",
    "UnknownError": "inference",
    "ValidationError": "inference",
}


def _hub_errors() -> dict[str, type[Exception]]:
    module = huggingface_hub.errors
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == module.__name__
    }


def _http_errors() -> Iterator[type[Exception]]:
    """All that the library under it raises for a request: no connection, a reset, a proxy, a time-out."""
    http = importlib.import_module(huggingface_hub.errors.HTTPError.__module__.partition(".")[0])
    for name in http.__all__:
        value = getattr(http, name)
        if inspect.isclass(value) and issubclass(value, http.HTTPError):
            yield value


HUB_ERRORS = [cls for name, cls in _hub_errors().items() if name not in NOT_OF_A_DOWNLOAD] + list(_http_errors())


def test_exceptions_of_the_hub_are_known_one_and_all() -> None:
    """A new one in huggingface_hub: can a download raise it? Then it is mapped; else name it above."""
    assert set(NOT_OF_A_DOWNLOAD) <= set(_hub_errors()), "gone from huggingface_hub"
    assert len(HUB_ERRORS) > 20


def _instance(cls: type[Exception]) -> Exception:
    error = cls.__new__(cls)  # their constructors want responses
    Exception.__init__(error, "the Hub said no\nand more")
    return error


@pytest.mark.parametrize("cls", HUB_ERRORS, ids=lambda cls: cls.__name__)
def test_errors_of_the_hub_are_mapped(cls: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _raising(_instance(cls)))
    monkeypatch.setattr("huggingface_hub.file_exists", _raising(_instance(cls)))
    with pytest.raises(errors.AdapterNotFoundError, match=cls.__name__) as caught:
        checkpoint.read("someone/adapter")
    assert isinstance(caught.value.__cause__, cls)
    assert "the Hub said no" in str(caught.value)


@pytest.mark.parametrize("message", ["", "\n", " \n "])
def test_foreign_error_that_says_nothing_is_mapped_too(
    message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _raising(OSError(message)))
    with pytest.raises(errors.AdapterNotFoundError, match="OSError"):
        checkpoint.read("someone/adapter")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ZeroDivisionError("a bug of ours")], ids=repr)
def test_what_is_no_fault_of_the_adapter_is_not_mapped(
    error: BaseException, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the tests above would also pass if everything were called a missing adapter."""
    monkeypatch.setattr(os, "preadv", _raising(error))
    with pytest.raises(type(error)) as caught:
        checkpoint.read(sound)
    assert caught.value is error


@pytest.mark.parametrize("error", [TypeError("no"), ValueError("no"), AttributeError("no")], ids=repr)
def test_errors_of_pefts_config_are_mapped(error: Exception, sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP.build()
    config = json.loads((sound / "adapter_config.json").read_text())
    config["revision"] = repr(error)  # a family of adapters is asked about once
    (sound / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("peft.LoraConfig.__post_init__", _raising(error))
    with pytest.raises(errors.ConfigError, match="no") as caught:
        hotslot.attach(model, {"new": sound})
    assert caught.value.__cause__ is error


# -- the package itself -------------------------------------------------------------------------------------------


def test_public_names_are_sorted_and_resolve() -> None:
    assert hotslot.__all__ == sorted(hotslot.__all__)
    assert dir(hotslot) == hotslot.__all__
    for name in hotslot.__all__:
        assert getattr(hotslot, name) is not None
    assert set(hotslot._HOMES) == set(hotslot.__all__)
    with pytest.raises(AttributeError, match="no attribute 'hotswap'"):
        hotslot.hotswap  # noqa: B018


@pytest.mark.parametrize(
    "name", sorted({path.stem for path in SOURCE.iterdir() if path.suffix in ("", ".py") and path.stem[0] != "_"})
)
def test_exported_names_of_each_module_are_sorted_and_resolve(name: str) -> None:
    module = importlib.import_module(f"hotslot.{name}")
    exported = getattr(module, "__all__", [])
    assert list(exported) == sorted(exported, key=lambda entry: (not entry.isupper(), entry[0].islower(), entry))
    assert [entry for entry in exported if not hasattr(module, entry)] == []


HEAVY = ("torch", "peft", "transformers", "safetensors", "huggingface_hub", "xxhash", "numpy", "typer", "rich")


def imported_after(code: str) -> set[str]:
    """Which of HEAVY a new interpreter has loaded after `code`."""
    report = f"import sys; {code}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_is_quick() -> None:
    assert imported_after("import hotslot; hotslot.__version__; dir(hotslot)") == set()
    assert imported_after("import hotslot; hotslot.errors.HotslotError; from hotslot import HotslotError") == set()
    assert "peft" not in imported_after("import hotslot; hotslot.testing")


def test_libraries_are_imported_when_they_are_needed() -> None:
    """The control."""
    assert {"torch", "peft"} <= imported_after("import hotslot; hotslot.hotswap_adapter")
