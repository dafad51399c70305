"""Tables and other text for a terminal, set by rich: names, then numbers to the right."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table

UNLIMITED = 1_000_000  # columns: nothing is folded
GAP = 2  # columns between two columns of a table


def text_console(out: IO[str], width: int, *, color: bool = False) -> Console:
    """A console that prints text as it is: no markup, no emoji codes, no highlighting."""
    from rich.console import Console

    return Console(
        file=out,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        no_color=not color,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """A table as plain text, however wide, with a rule under its heads.

    Args:
        heads: one a column.
        rows: cells, as many in each row as there are heads.
        names: this many columns at the left are names; the others stand to the right.
    """
    from rich.box import Box

    table = _table(Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True))
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i < names else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    text_console(out, UNLIMITED).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def styled_table(title: str, name_width: int, heads: Sequence[str]) -> Table:
    """A table to print on a `text_console`, still without rows.

    Args:
        title: head of the names, which are folded where the console is too narrow.
        name_width: columns that names have at least.
        heads: of the columns of numbers.
    """
    table = _table()
    table.add_column(title, overflow="fold", min_width=name_width)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _table(box: Box | None = None) -> Table:
    from rich.table import Table

    gap = GAP if box is None else GAP - 1  # a box has a blank between two columns
    return Table(
        box=box, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold"
    )
