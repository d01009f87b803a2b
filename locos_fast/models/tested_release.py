"""Whether the installed transformers is one that this package was tested with.

The package lives on transformers' internals, and another release may have moved them. The tested range stands in
setup.py, once: an installed package carries it in its metadata.
"""

from __future__ import annotations

import warnings
from importlib import metadata

from packaging.requirements import Requirement

PACKAGE = "locos_fast"


def warn_if_untested() -> None:
    """One UserWarning that names the installed release and the tested range, if the one is outside the other.

    Silent where `locos_fast` is on the path without being installed: then nothing says what was tested.
    """
    try:
        installed = metadata.version("transformers")
        requirements = [Requirement(line) for line in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return
    tested = next(requirement.specifier for requirement in requirements if requirement.name == "transformers")
    if not tested.contains(installed, prereleases=True):
        warnings.warn(
            f"locos_fast was tested with transformers {tested}, but {installed} is installed: "
            "a score may be refused or wrong",
            stacklevel=2,
        )
