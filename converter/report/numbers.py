"""Numbers as text, the same way in the console, in Markdown and on the page.

Absent is a dash, never a zero.
"""

from __future__ import annotations

import math

ABSENT = "–"


def _special(value: float | None) -> str | None:
    if value is None:
        return ABSENT
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return None


def plain(value: float | None, digits: int = 4) -> str:
    """`value` with `digits` significant digits, powers of ten where they are shorter."""
    special = _special(value)
    if special is not None or value is None:
        return special or ABSENT
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}"
        return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
    return (
        f"{value:.{max(digits - 2, 1)}e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    )


def tiny(value: float | None) -> str:
    """An error or tolerance: two digits and a power of ten."""
    special = _special(value)
    if special is not None or value is None:
        return special or ABSENT
    if value == 0:
        return "0"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")


def share(value: float | None) -> str:
    """A relative error: `3.2 %`, `0.40 %`, and powers of ten below 0.1 %."""
    if value is None or not math.isfinite(value):
        return _special(value) or ABSENT
    if value == 0:
        return "0 %"
    if abs(value) < 1e-3:
        return tiny(value)
    return percent(value, 0 if abs(value) >= 0.1 else 1 if abs(value) >= 0.01 else 2)


def fixed(value: float | None, decimals: int = 2) -> str:
    """`value` with a fixed number of decimals, so that a column lines up."""
    special = _special(value)
    if special is not None or value is None:
        return special or ABSENT
    return f"{value:,.{decimals}f}".replace("-", "−")


def percent(value: float | None, decimals: int = 1) -> str:
    """A share as per cent: 0.375 is `37.5 %`."""
    special = _special(value)
    if special is not None or value is None:
        return special or ABSENT
    return f"{value * 100:.{decimals}f} %".replace("-", "−")


def signed_percent(value: float | None, decimals: int = 1) -> str:
    """A change as per cent with its sign: `+4.2 %`, `−37.5 %`, `±0.0 %`."""
    text = percent(value, decimals)
    if value is None or not math.isfinite(value):
        return text
    if float(f"{value * 100:.{decimals}f}") == 0:
        return "±" + text.lstrip("−")
    return text if value < 0 else "+" + text


def size(value: float | None) -> str:
    """Bytes: exact below 10 KiB, then KiB, MiB, GiB with three digits."""
    special = _special(value)
    if special is not None or value is None:
        return special or ABSENT
    if value < 10 * 1024:
        return f"{plain(value, 5)} B"
    return _scaled(value, 1024, ("KiB", "MiB", "GiB", "TiB"))


def count(value: float | None) -> str:
    """A count: exact below 10,000, then K, M, G, T with three digits."""
    special = _special(value)
    if special is not None or value is None:
        return special or ABSENT
    if abs(value) < 10_000:
        return plain(value)
    return _scaled(value, 1000, ("K", "M", "G", "T"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 1
    while power < len(units) and abs(value) / base**power >= base - 0.5:
        power += 1
    return f"{plain(value / base**power, 3)} {units[power - 1]}"


def plural(number: int, noun: str) -> str:
    """`1 site`, `6 sites`, `0 sites`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def spread(values: list[float]) -> tuple[float, float] | None:
    """Smallest and largest of the values that are numbers, or None."""
    usable = [value for value in values if not math.isnan(value)]
    return (min(usable), max(usable)) if usable else None
