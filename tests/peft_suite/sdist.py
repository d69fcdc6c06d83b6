"""Takes the version of the installed peft, gives the folder of that release's own tests, unmodified.

PEFT's wheels hold no tests, and its code is not vendored here: pip fetches the source release, once.
"""

import hashlib
import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SHA256 = {"0.21.2": "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"}
CACHE = Path(__file__).parents[2] / ".pytest_cache" / "d" / "peft-sdist"


class SdistError(RuntimeError):
    """PEFT's tests cannot be had. The message says what to do."""


def fetch(cache: Path = CACHE) -> Path:
    """The verified source release of the installed peft, from `cache` or by pip."""
    version = importlib.metadata.version("peft")
    if version not in SHA256:
        raise SdistError(
            f"peft {version} is installed, but the sha256 of its source release is not known here (known: "
            f"{', '.join(SHA256)}). Install a known version; or read what changed in PEFT's hotswap tests, "
            f"then add the sha256 to {__file__} and the new tests to selection.py beside it."
        )
    archive = cache / f"peft-{version}.tar.gz"
    if not archive.exists() or _sha256(archive) != SHA256[version]:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as part:  # moved when whole: another run may be looking
            _download(version, Path(part))
            (Path(part) / archive.name).replace(archive)
    return archive


def extract(archive: Path, folder: Path) -> Path:
    """Unpacks PEFT's tests and pytest settings into `folder`; returns the root that holds them."""
    root = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as tar:
        wanted = [m for m in tar if m.name == f"{root}/pyproject.toml" or m.name.startswith(f"{root}/tests/")]
        tar.extractall(folder, members=wanted, filter="data")
    # The release leaves this file out, and the test modules import each other as a package.
    (folder / root / "tests" / "__init__.py").touch()
    return folder / root


def _download(version: str, folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"peft=={version} --hash=sha256:{SHA256[version]}\n")
    # pip runs a source release's setup.py even to download it, but only once the hash is right. It needs
    # setuptools alone, which torch requires anyhow: no isolated environment, which would download that too.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    command += ["--no-build-isolation", "--require-hashes", "--requirement", str(requirements)]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SdistError(
            f"pip could not download the source release of peft {version}, which holds PEFT's tests:\n"
            f"{done.stderr}\nCheck the network and pip's index, or put peft-{version}.tar.gz "
            f"(sha256 {SHA256[version]}) into {CACHE}."
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
