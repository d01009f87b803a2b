"""The command line, `locos-fast`: one file per command."""

from locos_fast.cli.app import main

__all__ = ["main"]
