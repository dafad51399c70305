"""Numbers as a reader wants them."""

from __future__ import annotations

MEMORY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
UNKNOWN = "\N{EN DASH}"


def loss(value: float) -> str:
    """Three decimals; two digits of a very small one."""
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"


def change(before: float, after: float) -> str:
    """Relative change in per cent, with its sign."""
    if before <= 0:
        return UNKNOWN
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")


def tone(before: float, after: float) -> str:
    """`good` if it fell, `bad` if it rose: for losses."""
    return "good" if after < before else "bad" if after > before else ""


def count(value: float) -> str:
    """Whole, with commas, from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(part: int, whole: int) -> str:
    """A share in whole per cent."""
    return f"{100 * part / whole:.0f} %"


def memory_power(num_bytes: float) -> int:
    """Index of the largest of MEMORY_UNITS that is below the number."""
    power = 0
    while num_bytes >= 1024 and power < len(MEMORY_UNITS) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    return power


def duration(seconds: float) -> str:
    """Seconds as hours, minutes, seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
