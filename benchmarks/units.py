"""Numbers as they are printed; nothing for what was not measured."""

GIB = 2**30


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds * 1e3:.0f} ms"


def megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e6:.0f} MB"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3g}x" if ratio < 1000 else f"{ratio:.0f}x"


def percent(fraction: float | None) -> str:
    """Signed, with three decimals: a thousandth of a percent."""
    return "" if fraction is None else f"{fraction:+.3%}"


def gibibytes(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:.3g} GiB"
