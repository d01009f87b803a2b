"""Data that ordinary wheels carry: its files are found in the installed wheel, the package itself is never imported."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import NamedTuple


class Wheel(NamedTuple):
    """A wheel of which only files are used, so that it is installed without what its package would need."""

    name: str  # of the distribution
    version: str  # the one that was tested

    @property
    def how_to_install(self) -> str:
        return f"pip install --no-deps {self.name}=={self.version}"

    def installed_version(self) -> str:
        """Raises ValueError, saying how to install it, if the wheel is not installed."""
        return self._distribution().version

    def files(self, suffix: str) -> list[Path]:
        """The installed files whose names end in `suffix`, ordered by path.

        Raises ValueError, saying how to install it, if the wheel is not installed or lacks a file that its record
        names, or has none of that kind.
        """
        recorded = self._distribution().files or []
        files = sorted(Path(str(file.locate())) for file in recorded if file.name.endswith(suffix))
        missing = next((file for file in files if not file.is_file()), None)
        if missing is not None or not files:
            what = f"{missing} is missing" if missing else f"it holds no {suffix} file"
            raise ValueError(
                f"{self.name} is not installed completely: {what}; {self.how_to_install} --force-reinstall"
            )
        return files

    def _distribution(self) -> importlib.metadata.Distribution:
        try:
            return importlib.metadata.distribution(self.name)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{self.name} is not installed: {self.how_to_install}") from None
