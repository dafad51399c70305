"""How a format is recognised by the keys of rows, and row -> Record."""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from posttrain_dist.data import Format
from posttrain_dist.data.formats.loss_weight import SPELLINGS, refuse_weights
from posttrain_dist.data.formats.shapes import FORMATS, OBJECTIVES, WITH_CHECK
from posttrain_dist.data.formats.template_kwargs import KEY as TEMPLATE_KWARGS
from posttrain_dist.data.read.bad_row import BadRow, bad_field, kind
from posttrain_dist.errors import ConfigError, DataError
from posttrain_dist.flow import Record

CHANNEL_KEYS = ("task_type", "channel", "data_source", "dataset", "source")  # the first one counts
_MAX_NAME = 100  # characters of a channel's name
# What data sets call the columns of rows with answers; the first that is there is proposed.
_THEIR_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "context"),
    "chosen": ("chosen_response", "response_chosen", "preferred", "accepted"),
    "rejected": ("rejected_response", "response_rejected", "dispreferred"),
    "completion": ("response", "answer", "output", "generation"),
    "answers": ("responses", "completions", "generations", "candidates"),
    "scores": ("ratings", "rewards"),
    "score": ("overall_score", "helpfulness", "rating", "reward", "quality"),
}
_CONVERTED = {Format.unpaired, Format.scored_completion}  # what data.convert_pairs makes of pairs


# ------------------------------------------------------------------------------- recognition


def recognise(rows: Sequence[Set[str]], accepts: Set[Format], where: str) -> Format:
    """The one accepted format whose keys most of these rows have.

    Args:
        rows: the keys of the first rows, already renamed.
        accepts: formats that the objective can train on.
        where: of the first row, for errors.

    Raises:
        DataError: no row has the keys of an accepted format.
        ConfigError: a row fits two formats, or as many rows fit one as fit another.
    """
    wanted = [format for format in FORMATS if format in accepts]
    if not rows:
        return wanted[0]  # nothing can be read, which is reported row by row
    fits = [_fitting(row, wanted) for row in rows]
    counts = Counter(format for row in fits for format in row)
    if not counts:
        raise _nothing_fits(rows[0], wanted, where)
    most = max(counts.values())
    found = next((row for row in fits if len(row) > 1), [f for f in counts if counts[f] == most])
    if len(found) == 1:
        return found[0]
    names = [format.name for format in found]
    raise ConfigError(
        f"the rows fit {' and '.join(names)}",
        where="data.format",
        fix=f"set data.format={' or data.format='.join(names)}; files of several formats are "
        "sources of their own (data.sources), each with its format",
    )


def _fitting(keys: Set[str], formats: Iterable[Format]) -> list[Format]:
    """Formats whose keys are there, without those whose keys are part of another such format."""
    fit = [format for format in formats if keys >= set(FORMATS[format].needs)]
    return [format for format in fit if not any(_is_part(format, other) for other in fit)]


def _is_part(small: Format, large: Format) -> bool:
    own, other = FORMATS[small], FORMATS[large]
    return small is not large and set(own.needs) < {*other.needs, *other.may}


def _nothing_fits(keys: Set[str], wanted: list[Format], where: str) -> DataError:
    others = _fitting(keys, FORMATS)
    shown = ", ".join(sorted(keys)) or "none"
    what = f"these are {others[0].name} rows" if others else f"no known format (keys: {shown})"
    examples = "".join(f"\n    {format.name}: {FORMATS[format].example}" for format in wanted)
    example = Format.prompt_completion if Format.prompt_completion in wanted else wanted[0]
    pairs = ", ".join(f"{name}: YOURS" for name in FORMATS[example].needs)
    names = f"set data.columns where the keys have other names: 'data.columns={{{pairs}}}'"
    renamed = _renamed(keys, wanted) if not others or others == [Format.prompt] else ""
    other = or_other(others[0], wanted).removeprefix(", or ") if others else ""
    if others and not other:
        what += ", which no objective here trains on yet"
    if renamed:
        other, names = f"set 'data.columns={{{renamed}}}' if these keys hold it", ""
    fix = f"{other}{'; ' if other else ''}this objective reads rows such as{examples}"
    return DataError(what, where=where, fix=fix + ("" if others or renamed else f"\n  or {names}"))


def _renamed(keys: Set[str], wanted: Iterable[Format]) -> str:
    """The columns by which rows of answers would fit a format; empty where none would."""
    for format in wanted:
        absent = [name for name in FORMATS[format].needs if name not in keys]
        found = {
            name: theirs
            for name in absent
            if (theirs := next((n for n in _THEIR_NAMES.get(name, ()) if n in keys), None))
        }
        if found and len(found) == len(absent) and format not in WITH_CHECK:
            return ", ".join(f"{ours}: {theirs}" for ours, theirs in found.items())
    return ""


def or_other(format: Format, wanted: Iterable[Format]) -> str:
    """The end of an advice on rows of a format that is not wanted; empty where there is none.

    It names the objective that does read them, or the setting by which they are converted.
    """
    if format is Format.preference and _CONVERTED & set(wanted):
        return (
            ", or set data.convert_pairs=true, which makes single answers of pairs: the chosen "
            "one desirable (worth 1), the rejected one not (0)"
        )
    name = OBJECTIVES.get(format)
    return f", or set objective={name}, which reads {format.name} rows" if name else ""


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse names that no format has.

    Raises:
        ConfigError: with the nearest name there is.
    """
    ours = {*CHANNEL_KEYS, "check"}
    for shape in FORMATS.values():
        ours |= {*shape.needs, *shape.may}
    for name in columns:
        if name not in ours:
            near = difflib.get_close_matches(name, ours, n=1) or sorted(ours)
            what = f"no format has a column {name!r}"
            fix = f"write our name before the colon: {', '.join(near)}"
            raise ConfigError(what, where=f"data.columns.{name}", fix=fix)


# ------------------------------------------------------------------------------ row to Record


def to_record(
    format: Format, row: Any, stem: str, where: str, columns: Mapping[str, str]
) -> Record:
    """Check a row of a format field by field.

    Args:
        format: one of FORMATS.
        row: the JSON value, its columns already renamed.
        stem: name of the file, the channel of rows that name none.
        where: "file:line".
        columns: our name -> theirs, for errors.

    Raises:
        BadRow: what is wrong, and in which field.
    """
    shape = FORMATS[format]
    expected = f"this objective reads rows such as {shape.example}"
    if not isinstance(row, dict):
        raise BadRow(f"is {kind(row)}, expected an object", expected)
    for name in shape.needs:
        if name not in row:
            keys = ", ".join(sorted(row)) or "none"
            theirs = columns.get(name, name)
            raise BadRow(f"has no key {theirs!r} (keys: {keys})", expected)
    if len(row) > len(shape.needs):
        _check_keys(format, row)
    check = row.get("check")
    if check not in (None, "exact"):
        fix = 'use "exact" or leave out'
        raise bad_field("check", f'is {check!r}, the only one is "exact"', fix)
    filled = shape.read(row)
    if check:
        _check_exact(format, filled)
    return Record(channel=read_channel(row, stem), where=where, check=check, **filled)


def rename(row: Any, columns: Mapping[str, str]) -> Any:
    """The row with our names for its keys."""
    if not columns or not isinstance(row, dict):
        return row
    taken = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    theirs = set(columns.values())
    return {key: value for key, value in row.items() if key not in theirs} | taken


def _check_exact(format: Format, filled: dict[str, Any]) -> None:
    messages = filled.get("messages")
    if format is Format.preference:  # the chosen answer is the right one
        return
    if format not in WITH_CHECK or not messages:
        what = f"needs messages, and this is a {format.name.replace('_', '-')} row"
        raise bad_field("check", what, "remove check")
    if messages[-1]["role"] != "assistant":
        what = 'is "exact" and the last turn is no assistant turn'
        raise bad_field("check", what, "end with the right answer")


def read_channel(row: dict[str, Any], stem: str) -> str:
    """`task_type`, else the first of its synonyms that is a name, else the name of the file.

    Raises:
        BadRow: task_type is no short printable text.
    """
    if "task_type" not in row:
        synonyms = (row[key] for key in CHANNEL_KEYS[1:] if key in row)
        return next((value for value in synonyms if _is_name(value)), stem)
    channel = row["task_type"]
    if not isinstance(channel, str):
        fix = "write it as a JSON string"
        raise bad_field("task_type", f"is {kind(channel)}, expected text", fix)
    fix = "give a short printable name: it names the channel"
    if len(channel) > _MAX_NAME:
        what = f"has {len(channel)} characters, and {_MAX_NAME} are allowed"
        raise bad_field("task_type", what, fix)
    if not channel.strip() or not channel.isprintable():
        raise bad_field("task_type", f"is {channel!r}", fix)
    return channel


def _is_name(value: Any) -> bool:
    """Whether a synonym of task_type names a channel; addresses and texts are notes."""
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME:
        return False
    return value.isprintable() and value == " ".join(value.split()) and "://" not in value


def _check_keys(format: Format, row: dict[str, Any]) -> None:
    shape = FORMATS[format]
    for name in shape.never:
        if row.get(name) not in (None, [], {}, ""):
            expected = f"this objective reads rows such as {shape.example}"
            what = f"key {name!r} is not supported beside {shape.needs[0]!r}"
            raise BadRow(what, expected, field=name)
    if shape.weightless is not None:
        what = f"remove it: {format.name} rows have no weights; leave out those not to train on"
        refuse_weights(row, shape.weightless, what)
    near = _misspelt(format, frozenset(row))
    if near:
        fix = f"write {near[1]!r}, or rename the key"
        raise BadRow(f"unknown key {near[0]!r}", fix, field=near[0])


@functools.lru_cache(maxsize=4096)
def _misspelt(format: Format, keys: frozenset[str]) -> tuple[str, str] | None:
    """(a key, the known key that it is likely meant to be); that one is absent."""
    shape = FORMATS[format]
    known = {*shape.needs, *shape.may, "task_type", "check"}
    if format is Format.prompt:  # its other columns are its own
        known = {"task_type", "tools", TEMPLATE_KWARGS}
    absent = known - keys
    for name in sorted(keys - {*known, *CHANNEL_KEYS, *shape.needs, *SPELLINGS}):
        near = difflib.get_close_matches(name, absent, n=1, cutoff=0.75)
        if near:
            return name, near[0]
    return None
