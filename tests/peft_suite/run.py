"""Runs PEFT's own hotswap tests with another module's functions in PEFT's place.

In the folder `tests`:

    python -m peft_suite.run hotslot                # or peft.utils.hotswap, or peft_suite.noop
    python -m peft_suite.run hotslot -x -k conv2d   # what it does not know goes to pytest

It wants a process of its own: the hub's cache is fixed when its library is imported, PEFT's functions are
replaced for good, and PEFT's tests are a package named `tests`.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from peft_suite import sdist, selection

PARTS = {"eager": selection.EAGER, "compiled": selection.COMPILED}
PARTS["all"] = PARTS["eager"] + PARTS["compiled"]


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("peft_suite.run", None, __doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("functions", help="the module that PEFT's four functions are taken from")
    parser.add_argument("--part", choices=PARTS, default="all")
    parser.add_argument("--report", type=Path, default=Path(os.devnull), help="each test's outcome, in JSON")
    args, for_pytest = parser.parse_known_args()

    try:
        archive = sdist.fetch()
    except sdist.SdistError as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as folder:
        root = sdist.extract(archive, Path(folder))
        # Read when these libraries are imported, which is why the imports below come late.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": f"{folder}/hub", "OMP_NUM_THREADS": "1"}
        # A cache of its own: nothing compiled by another version is found.
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        import pytest

        from peft_suite import hub, plugin

        hub.build(Path(folder) / "hub")
        suite = plugin.PeftSuite(args.functions, PARTS[args.part], args.report.absolute())
        os.environ.pop("PYTEST_ADDOPTS", None)  # those are for our tests
        os.chdir(root)
        # PEFT's settings, less a coverage plugin and the errors for what a newer transformers deprecates.
        settings = ["-c", "pyproject.toml", "--rootdir", ".", "-o", "addopts=", "-o", "filterwarnings="]
        settings += ["-p", "no:cacheprovider"]
        return pytest.main([*settings, *for_pytest, *selection.CLASSES], plugins=[suite])


if __name__ == "__main__":
    sys.exit(main())
