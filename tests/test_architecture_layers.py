"""The rooms of the library import downward only, the kernels import nothing of it, and no file outgrows a reader."""

import ast
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 400  # lines

# the folder has no __init__.py, so that import-linter does not see it (tests/test_packaging.py says why)
KERNELS = "locos_fast.kernels"


def files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Every module that a file may import: `from a import b` is read as a.b, what is beside it as .b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            found |= {f"{source}.{name.name}" for name in node.names}
    return found


def test_rooms_import_downward_only(capsys):
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize("file", files("kernels"), ids=lambda file: file.stem)
def test_kernels_import_no_room(file):
    assert not {name for name in imports(file) if name.startswith(("locos_fast", ".."))}


def test_only_the_tensor_functions_import_kernels():
    importing = [file for file in files("locos_fast") if any(name.startswith(KERNELS) for name in imports(file))]
    assert {file.relative_to(ROOT / "locos_fast").parts[0] for file in importing} == {"ops"}


@pytest.mark.parametrize("folder", ["kernels", "locos_fast", "benchmarks", "tests"])
def test_no_file_is_longer_than_400_lines(folder):
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files(folder)}
    assert lengths
    assert not {name for name, length in lengths.items() if length > LONGEST}
