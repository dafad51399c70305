"""Numbers as text: every format that pages and terminal use."""

from __future__ import annotations

MEMORY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
UNKNOWN = "\N{EN DASH}"  # of a page
_SIZES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


# -------------------------------------------------------------------------------------- losses


def loss(value: float) -> str:
    """Three decimals; two digits of a very small one."""
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"


def loss_of_log(value: float | None) -> str:
    """Four decimals, as the lines and tables of the terminal have it; `-` of a missing one."""
    return "-" if value is None else f"{value:.4f}"


def change(before: float, after: float) -> str:
    """Relative change in per cent, with its sign."""
    if before <= 0:
        return UNKNOWN
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")


def tone(before: float, after: float) -> str:
    """`good` if it fell, `bad` if it rose: for losses."""
    return "good" if after < before else "bad" if after > before else ""


# -------------------------------------------------------------------------------------- counts


def whole(value: int | None) -> str:
    """All digits, with commas; what is missing is a dash."""
    return UNKNOWN if value is None else f"{value:,}"


def count(value: float) -> str:
    """Whole, with commas, from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def general(value: float) -> str:
    """Any number of which nothing is known: four digits, or whole with commas from 10,000 on."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def rounded(value: float) -> str:
    """`5.1k` of 5123, `57.8M` of 57,812,345; whole below a thousand."""
    for size, letter in _SIZES:
        if value >= 0.9995 * size:  # what would be rounded to 1000 of the next smaller unit
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def billions(value: float) -> str:
    """`rounded`, with B for a billion, as sizes of models and data are called: `70.6B`."""
    return rounded(value).replace("G", "B")


def power_of_two(value: int) -> str:
    """A length that is a power of two: `4,096`, and from 16k on in units of 1024."""
    return f"{value:,}" if value < 10_000 else f"{value // 1024:,}k"


def times(value: float | None) -> str:
    """A factor or number of passes in four digits at most; what is missing is a dash."""
    return UNKNOWN if value is None else f"{value:.4g}"


def plural(value: int, noun: str) -> str:
    """`1 check`, `2 checks`."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


# -------------------------------------------------------------------------------------- shares


def share(value: float | None) -> str:
    """A share, 0 to 1, in per cent with one decimal; what is missing is a dash."""
    return UNKNOWN if value is None else f"{value:.1%}"


def share_of(part: float, of: float) -> str:
    """`part / of` as `share` writes it; a dash where there is nothing that it could be of."""
    return share(part / of if of else None)


def percent(part: float, of: float) -> str:
    """A share in whole per cent."""
    return f"{100 * part / of:.0f} %"


def bar_width(part: float, of: float) -> float:
    """Width in per cent of a bar that is full at `of`."""
    return round(100 * part / of, 1) if of else 0


# ------------------------------------------------------------------------------ memory and time


def memory_power(num_bytes: float) -> int:
    """Index of the largest of MEMORY_UNITS that is below the number."""
    power = 0
    while num_bytes >= 1024 and power < len(MEMORY_UNITS) - 1:
        num_bytes, power = num_bytes / 1024, power + 1
    return power


def memory(num_bytes: float) -> str:
    """Bytes in three digits and the unit that suits them: `35.3 GiB`, `812 MiB`."""
    power = memory_power(abs(num_bytes))
    value = num_bytes / 1024**power
    digits = 0 if abs(value) >= 100 or not power else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {MEMORY_UNITS[power]}".replace("-", "\N{MINUS SIGN}")


def hours(value: float) -> str:
    """Hours for a plan: minutes below one, days from two on."""
    if value < 1:
        return f"{60 * value:.3g} min"
    return f"{value:.3g} h" if value < 48 else f"{value / 24:,.1f} days"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes, seconds, for a page."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes, rest = _split(seconds)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour, for a line that changes in place."""
    hours, minutes, rest = _split(max(seconds, 0))
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _split(seconds: float) -> tuple[int, int, int]:
    """Hours, minutes, seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return *divmod(minutes, 60), rest
