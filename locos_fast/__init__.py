"""Find the attention heads with which a long-context language model retrieves an answer, by what they write."""

from locos_fast._version import __version__

__all__ = ["__version__"]
