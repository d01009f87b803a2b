"""The command line's entry point, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from locos_fast.cli import app as cli


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: Sequence[str]
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `locos-fast` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["locos-fast", *command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err
