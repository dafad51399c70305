"""What both pages are made with: their assets, the engine that fills them in, key figures."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from posttrain_dist.report.numbers import whole

MAX_CHANNEL_CHARTS = 24  # panels of a page; more than this and nobody looks at any of them


@dataclass(slots=True, kw_only=True)
class Card:
    """One key figure; `before` stands grey in front of the value."""

    label: str
    value: str
    sub: str
    before: str = ""
    unit: str = ""
    tone: str = ""  # of `sub`: good, bad
    wide: bool = False  # two columns on a phone


def asset(name: str) -> str:
    """The text of a file of assets/report."""
    return (files("posttrain_dist.assets") / "report" / name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Fill in a template of assets/report; all values are data and escaped, but for Markup."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["whole"] = whole
    return environment.from_string(asset(template)).render(**values)
