"""The Triton kernels are installed as `locos_fast.kernels` and never hide, or are hidden by, Hugging Face's `kernels`.

transformers imports the distribution `kernels` by name as soon as it finds a version it accepts, so a package of ours
under that name would break `import transformers.modeling_utils`. Every case below is a process of its own.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import locos_fast

ROOT = Path(__file__).resolve().parents[1]

# In `python -c` the current folder is first on sys.path, as it is for anyone who works in the repository.
IMPORTS = """
import transformers.modeling_utils, locos_fast, locos_fast.kernels
import importlib.util, pkgutil
from transformers.utils import is_kernels_available
hf_kernels = importlib.util.find_spec("kernels")
print(locos_fast.__file__)
print(hf_kernels.origin if hf_kernels else None)
print(is_kernels_available())
print(*sorted(module.name for module in pkgutil.iter_modules(locos_fast.kernels.__path__)))
"""

# Whatever name transformers imports is a class whose instances are decorators that change nothing.
FAKE_KERNELS = """
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, decorated): return decorated

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""


class Imported(NamedTuple):
    """What IMPORTS printed."""

    locos_fast: str  # file that `locos_fast` came from
    kernels: str  # file that `import kernels` would load, "None" for a folder without __init__.py or nothing at all
    kernels_available: str  # what transformers thinks of it
    modules: str  # of locos_fast.kernels


def run_python(*arguments: str, cwd: Path, path: list[Path] | None = None) -> str:
    """Standard output of this interpreter, run in `cwd` with the folders of `path` on PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path or []))}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """Build the "wheel" or "sdist" of a source folder through the hook that pip calls, without downloading anything."""
    hook = f"import sys; from setuptools.build_meta import build_{kind}; print(build_{kind}(sys.argv[1]))"
    return out / run_python("-c", hook, str(out), cwd=source).splitlines()[-1]


def contents(wheel: Path) -> dict[str, int]:
    """Name and checksum of every file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.CRC for entry in archive.infolist()}


def kernel_modules() -> list[str]:
    return sorted(file.stem for file in (ROOT / "kernels").glob("*.py"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is packaged, because building leaves files behind that would end up in the next wheel."""
    copy = tmp_path_factory.mktemp("source")
    for file in ["setup.py", "pyproject.toml", "README.md", "LICENSE"]:
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy)
    for folder in ["kernels", "locos_fast"]:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed_wheel(wheel, tmp_path_factory) -> Path:
    """A folder with the wheel installed in it; first on PYTHONPATH it goes before the editable install."""
    target = tmp_path_factory.mktemp("site")
    run_python("-m", "pip", "install", "-qq", "--no-deps", "--target", str(target), str(wheel), cwd=target)
    return target


@pytest.fixture(scope="module")
def fake_hf_kernels(tmp_path_factory) -> Path:
    """A folder with a distribution `kernels` of a version that transformers accepts."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    site = tmp_path_factory.mktemp("hf")
    files = {
        "kernels/__init__.py": FAKE_KERNELS,
        f"kernels-{KERNELS_MIN_VERSION}.dist-info/METADATA": (
            f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
        ),
        f"kernels-{KERNELS_MIN_VERSION}.dist-info/top_level.txt": "kernels\n",
    }
    for name, text in files.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text)
    return site


@pytest.mark.parametrize("hf_kernels", ["with-hf-kernels", "without"])
@pytest.mark.parametrize("install", ["editable", "wheel"])
@pytest.mark.parametrize("place", ["repository-root", "elsewhere"])
def test_imports_beside_transformers(place, install, hf_kernels, installed_wheel, fake_hf_kernels, tmp_path):
    with_fake = hf_kernels == "with-hf-kernels"
    if not with_fake and any(importlib.metadata.distributions(name="kernels")):
        pytest.skip("Hugging Face's kernels is installed, so it cannot be absent")
    path = [installed_wheel] if install == "wheel" else []
    path += [fake_hf_kernels] if with_fake else []
    at_root = place == "repository-root"

    output = run_python("-c", IMPORTS, cwd=ROOT if at_root else tmp_path, path=path)

    imported = Imported(*output.splitlines())
    ours = installed_wheel if install == "wheel" and not at_root else ROOT  # the current folder goes first
    assert Path(imported.locos_fast).resolve() == (ours / "locos_fast" / "__init__.py").resolve()
    assert imported.kernels == (str(fake_hf_kernels / "kernels" / "__init__.py") if with_fake else "None")
    assert imported.kernels_available == str(with_fake)
    assert imported.modules.split() == kernel_modules()


def test_wheel_has_the_kernels_inside_locos_fast_only(wheel):
    files = contents(wheel)
    assert {name.split("/")[0] for name in files} == {"locos_fast", f"locos_fast-{locos_fast.__version__}.dist-info"}
    in_wheel = {Path(name).stem for name in files if name.startswith("locos_fast/kernels/")}
    assert in_wheel == set(kernel_modules())
    assert "locos_fast/py.typed" in files


def test_wheel_has_every_module_of_the_library(wheel):
    modules = {f"locos_fast/{file.relative_to(ROOT / 'locos_fast')}" for file in (ROOT / "locos_fast").rglob("*.py")}
    assert modules <= contents(wheel).keys()


def test_sdist_builds_the_same_wheel(source, wheel, tmp_path):
    shutil.unpack_archive(build("sdist", source, tmp_path), tmp_path)
    (unpacked,) = (folder for folder in tmp_path.iterdir() if folder.is_dir())
    assert contents(build("wheel", unpacked, tmp_path)) == contents(wheel)


def test_version_has_one_source():
    assert importlib.metadata.version("locos_fast") == locos_fast.__version__
