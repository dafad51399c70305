"""data_report.html: what is in the prepared data, and whether it can be trained on.

data_report.json -> figures, histograms, runs of tokens (plain values) -> assets/report/data.*
"""

from __future__ import annotations

import base64
import hashlib
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.files import write_atomic
from posttrain_dist.report.blocks import blocks
from posttrain_dist.report.data.answer_figures import (
    answer_warnings,
    comparison_rows,
    is_better,
    names_of_answers,
    of_sample,
)
from posttrain_dist.report.data.data_figures import (
    COUNTS,
    SPLITS,
    cards_of,
    channel_table,
    channels_of,
    checks_of,
    rejected_total,
    source_rows,
    turns_line,
    verdict_of,
)
from posttrain_dist.report.data.histogram import panels_of
from posttrain_dist.report.data.token_runs import (
    Mark,
    Piece,
    Run,
    Token,
    clean,
    hidden_name,
    reads_right_to_left,
    runs,
)
from posttrain_dist.report.numbers import share_of, times, whole
from posttrain_dist.report.page import asset, render

if TYPE_CHECKING:
    from markupsafe import Markup

# Tokens that are drawn: of all conversations, and of one at least and at most. Each is an element
# of the page, and a browser is slow from some hundred thousand on.
MAX_TOKENS = 120_000
_FEWEST, _MOST = 300, 4_000
_TAIL = 0.4  # of a conversation that is cut, the share shown of its end: the answer stands there


def write_data_page(report: dict[str, Any], folder: Path) -> Path:
    """Write data_report.html into a folder that is there, and return its path."""
    page = folder / "data_report.html"
    write_atomic(page, data_page(report))
    return page


def data_page(report: dict[str, Any]) -> str:
    """A data report as one self-contained page; any part of `report` may be missing or empty."""
    from markupsafe import Markup

    script = f"\n{asset('data.js')}"
    examples, batch = _examples(report), _batch(report)
    report = clean({key: v for key, v in report.items() if key not in ("examples", "batch")})
    settings = report.get("settings") or {}
    channels = channels_of(report)
    panels = panels_of(report, channels)
    tables = [(title, channel_table(report, split)) for split, title in SPLITS.items()]
    return render(
        "data.html.j2",
        css=Markup(asset("report.css") + asset("data.css")),
        js=Markup(script),
        # Only this program may run, whatever the data holds.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        name=report.get("name") or "Training data",
        verdict=verdict_of(report),
        facts=[
            (label, whole(value) if isinstance(value, int) else str(value))
            for label, key in (
                ("tokenizer", "tokenizer"),
                ("template", "template"),
                ("supervised", "supervise"),
                ("max length", "max_length"),
            )
            if (value := settings.get(key)) not in (None, "")
        ],
        cards=cards_of(report),
        turns=turns_line(report),
        heads=COUNTS,
        tables=[(title, rows) for title, rows in tables if rows],
        compared=[(title, comparison_rows(report, split)) for split, title in SPLITS.items()],
        answer_warnings=answer_warnings(report),
        panels=panels,
        panels_hidden=len(channels) > len(panels),
        num_channels=len(channels),
        max_length=settings.get("max_length"),
        over=any(bar.over for panel in panels for bar in panel.bars),
        checks=checks_of(report),
        rejected=report.get("rejected") or [],
        rejected_total=rejected_total(report),
        sources=source_rows(report),
        files=report.get("files") or [],
        examples=examples,
        batch=batch,
        settings=blocks(settings),
    )


# ------------------------------------------------------------------------------------- tokens


def _examples(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Conversations by channel, those that are too long without their middle."""
    groups = {name: found for name, found in (report.get("examples") or {}).items() if found}
    count = sum(map(len, groups.values()))
    most = min(_MOST, max(_FEWEST, MAX_TOKENS // max(1, count)))
    return [
        {
            "name": clean(str(name)),
            "examples": [
                {
                    "where": clean(str(example.get("where", ""))),
                    "split": SPLITS.get(split := str(example.get("split", "")), split).lower(),
                    "tokens": whole(example.get("tokens")),
                    "supervised": whole(example.get("supervised")),
                    "parts": _parts(example.get("pieces") or [], most),
                    "answers": _answers(example.get("answers") or [], most),
                }
                for example in found
            ],
        }
        for name, found in groups.items()
    ]


def _answers(answers: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The answers of a row, which stand side by side."""
    return [
        {
            "name": name,
            "better": is_better(answer, answers),
            "tokens": whole(answer["tokens"]),
            "supervised": whole(answer["supervised"]),
            "parts": _parts(answer["pieces"], most),
        }
        for name, answer in zip(names_of_answers(answers), answers, strict=True)
    ]


def _parts(pieces: list[Piece], most: int) -> list[dict[str, Any]]:
    """The tokens to show: all of them, or the first and the last."""
    cut = max(0, len(pieces) - most)
    if not cut:
        return [{"first": 0, "html": _html(runs(pieces)), "cut": 0}]
    tail = round(most * _TAIL)
    head = most - tail
    return [
        {"first": 0, "html": _html(runs(pieces[:head])), "cut": cut},
        {"first": head + cut, "html": _html(runs(pieces[head + cut :])), "cut": 0},
    ]


def _batch(report: dict[str, Any]) -> dict[str, Any] | None:
    """One pack: its samples as they follow each other, and where they stand in it."""
    batch = report.get("batch") or {}
    pieces = batch.get("pieces") or []
    if not pieces:
        return None
    bounds = [i for i in range(len(pieces)) if not i or pieces[i][3] != pieces[i - 1][3]]
    tokens = int(batch.get("tokens") or len(pieces))
    limit = (report.get("settings") or {}).get("max_length") or tokens
    whole_T = max(limit, tokens, len(pieces))
    most = max(_FEWEST, MAX_TOKENS // 2 // len(bounds))
    units = batch.get("units") or []
    samples, strip = [], []
    for start, end in zip(bounds, [*bounds[1:], len(pieces)], strict=True):
        inside = pieces[start:end]
        found = runs(inside)
        targets = sum(piece[1] > 0 for piece in inside)
        samples.append(
            {
                "number": whole(pieces[start][3]),
                "kind": of_sample(units, pieces[start][3]),
                "span": f"{start:,} to {end - 1:,}",
                "tokens": whole(len(inside)),
                "supervised": whole(targets),
                "parts": _parts(inside, most),
            }
        )
        strip.append(
            {
                "width": round(100 * (end - start) / whole_T, 3),
                "tip": f"sample {pieces[start][3]}\n{end - start:,} tokens\n{targets:,} supervised",
                "targets": _stretches(found, end - start),
            }
        )
    return {
        "tokens": whole(tokens),
        "num_samples": whole(batch.get("samples", len(bounds))),
        "limit": whole(limit),
        "fill": share_of(tokens, limit),
        "strip": strip,
        "samples": samples,
        "has_answers": any(sample["kind"] for sample in samples),
    }


def _stretches(found: list[Run], length: int) -> list[tuple[float, float]]:
    """(left, width) of the supervised runs in per cent of a sample."""
    stretches, at = [], 0
    for run in found:
        size = len(run.tokens)
        if run.weight > 0:
            stretches.append((round(100 * at / length, 3), round(100 * size / length, 3)))
        at += size
    return stretches


def _html(found: list[Run]) -> Markup:
    # By hand, not by the template: there are a hundred thousand of them.
    from markupsafe import Markup

    parts = []
    for run in found:
        kind = "s" if run.weight > 0 else "m"
        note = f' data-w="{times(run.weight)}"' if run.weight not in (0, 1) else ""
        parts.append(f'<span class="r {kind}"{note}>{_tokens(run.tokens)}</span>')
    return Markup("".join(parts))


def _tokens(tokens: list[Token]) -> str:
    """Each token by itself, in the direction in which the text around it is read.

    A browser orders right-to-left text without regard to tokens, so that one would lie in several
    places: each is isolated, by data.css, and lies in a stretch that says how to go on.
    """
    parts = []
    for _, group in groupby(tokens, key=lambda token: token.special):
        stretch = list(group)
        html = "".join(
            f"<i{' class=c' if token.special else ''}>{''.join(map(_mark, token.marks))}</i>"
            for token in stretch
        )
        text = "".join(mark.text for token in stretch for mark in token.marks)
        parts.append(f'<bdi dir="rtl">{html}</bdi>' if reads_right_to_left(text) else html)
    return "".join(parts)


def _mark(mark: Mark) -> str:
    from markupsafe import escape

    if mark.kind == "newline":
        return "<u class=n></u>\n"
    if mark.kind in ("space", "tab"):
        return f"<u class={mark.kind}>{mark.text}</u>"
    if mark.kind == "hidden":
        return f"<u class=h>{hidden_name(mark.text)}</u>"
    return str(escape(mark.text))
