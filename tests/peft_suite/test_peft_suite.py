"""PEFT's own hotswap tests pass with hotslot's functions in PEFT's place. How: `run.py` in this folder."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from peft_suite.selection import COMPILED, DESELECTED, EAGER, NEED_NO_HOTSWAP

# The first test of each part waits for the part, and a small machine takes minutes to compile.
pytestmark = pytest.mark.timeout(900)

Outcomes = dict[str, dict[str, object]]

# Before any test has run: what inductor leaves in the environment of one process is not for another.
_ENVIRONMENT = dict(os.environ)


@functools.cache
def run(functions: str, part: str) -> tuple[Outcomes, str]:
    """Runs a part of PEFT's tests in another process, once: each test's outcome, and what pytest said."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "peft_suite.run", functions, "--part", part, "--report", str(report)]
        tests = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=tests, env=_ENVIRONMENT, capture_output=True, text=True, check=False)
        ran = report.exists() and done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        outcomes = json.loads(report.read_text()) if ran else {}
        return outcomes, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def outcomes_of(functions: str, part: str) -> Outcomes:
    outcomes, said = run(functions, part)
    if not outcomes:
        pytest.fail(f"PEFT's tests were not run.\n{said}", pytrace=False)
    return outcomes


@pytest.mark.parametrize("name", EAGER)
def test_passes(name):
    passed(outcomes_of("hotslot", "eager"), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_passes_compiled(name):
    passed(outcomes_of("hotslot", "compiled"), name)


def test_none_is_left_out():
    found = {name for name in outcomes_of("hotslot", "eager") if name.partition("[")[0] not in DESELECTED}
    assert found == {*EAGER, *COMPILED}


def test_a_hotswap_that_does_nothing_fails():
    outcomes = outcomes_of("peft_suite.noop", "eager")
    assert {name for name in EAGER if outcomes[name]["outcome"] == "passed"} == set(NEED_NO_HOTSWAP)


@pytest.mark.slow
@pytest.mark.skipif("HOTSLOT_PEFT_ITSELF" not in os.environ, reason="wanted where hotslot fails: HOTSLOT_PEFT_ITSELF=1")
def test_peft_itself_passes():
    """If this fails, the fault is in how the tests are run, or in PEFT, and not in hotslot."""
    for name, seen in outcomes_of("peft.utils.hotswap", "eager").items():
        if name in EAGER:
            assert seen["outcome"] == "passed", seen["error"]


def passed(outcomes: Outcomes, name: str) -> None:
    if outcomes[name]["outcome"] != "passed":
        pytest.fail(f"{outcomes[name]['outcome']}\n{outcomes[name]['error']}", pytrace=False)
