"""An installed wheel as importlib.metadata sees it: a folder on the path with files and their record."""

from pathlib import Path


def install(site: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """Put the files and a dist-info folder into `site`; importing the package is an error. Returns `site`."""
    package = name.replace("-", "_")
    info = site / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    files = {f"{package}/__init__.py": b"raise AssertionError('the package was imported')\n"} | files
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)
    names = [*files, f"{info.name}/METADATA", f"{info.name}/RECORD"]
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in names))
    return site
