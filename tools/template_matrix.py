"""The matrix of template shapes and conversations, into the last section of docs/templates.md.

    python tools/template_matrix.py            # writes the section
    python tools/template_matrix.py qwen3 phi4 # prints each outcome of some shapes

The shapes, their conversations, and the oracle that judges what becomes of them are those of
tests/data/chat.
"""

from __future__ import annotations

import argparse
import re
import runpy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posttrain_dist.data import Form, Template, Thinking
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.data.chat.rendering.template_choice import load_templates
from posttrain_dist.errors import PosttrainError
from posttrain_dist.flow import Record

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "templates.md"
_TESTS = ROOT / "tests" / "data" / "chat"
_INTRODUCTION = """\
Small templates with the structure of published ones (`tests/data/chat/shapes`), each with a
tokenizer of its own tokens and every conversation of the list, in both forms. "agree": tokens and
targets are those that an oracle derives from `apply_chat_template` alone
(`tests/data/chat/template_oracle.py`). All else is refused, with the reason; a row so refused is
left out under `data.on_bad_row=skip`. What becomes of the rows under a template of your own:
`posttrain inspect`. This section is written by `python tools/template_matrix.py`."""
BEGIN, END = "<!-- template matrix: begin -->", "<!-- template matrix: end -->"
FORMS = (Form.auto, Form.turns)

_shapes = runpy.run_path(str(_TESTS / "shapes" / "shape_index.py"))
_chats = runpy.run_path(str(_TESTS / "shapes" / "conversations.py"))
_oracle = runpy.run_path(str(_TESTS / "template_oracle.py"))
GROUPS: dict[str, tuple[str, ...]] = _chats["GROUPS"]
CONVERSATIONS = [name for names in GROUPS.values() for name in names]
# What a refusal says -> the words for it in the matrix; the first that is found counts.
_REASONS = {
    r"opens its thoughts": "the prompt opens thoughts, the turn has none",
    r"closes its thoughts": "the prompt closes thoughts, the turn has some",
    r"refuses this conversation": "the template refuses it",
    r"write all of \S+reasoning_content": "thoughts are not written",
    r"write all of \S+content": "text is cut out",
    r"show the row's tools": "tools are not written",
    r"tool_calls": "calls are not written",
    r"no end-of-turn token": "no token ends the turn",
    r"cannot be proved": "its place is not proved",
    r"holds a second": "a second begin token",
    r"none called 'default'": "no template for rows without tools",
}


class Outcome(NamedTuple):
    """What became of one conversation; both texts are empty where encoder and oracle agree."""

    refusal: str  # the error of the encoder
    fault: str  # what the oracle says against the samples of a row that was taken


AGREED = Outcome("", "")


def read_shapes() -> list[Any]:
    """Every shape of tests/data/chat/shapes, once more with each of its variables and options."""
    return list(_shapes["read_shapes"]())


class Row(NamedTuple):
    """One conversation as the encoder took it, or refused it."""

    name: str
    refusal: str
    samples: list[tuple[list[int], list[float]]]  # ids and weights of each
    oracle: Any  # `oracle.fault(samples)`: what is wrong with them


def encode(shape: Any, names: Sequence[str], form: Form) -> Iterator[Row]:
    """Some conversations with a shape, and the oracle of each."""
    tokenizer, options = shape.tokenizer(), dict(shape.choice)
    if "thinking" in options:
        options["thinking"] = Thinking[options["thinking"]]
    choice = Template(form=form, variables=dict(shape.variables), **options)
    templates = load_templates(choice, tokenizer, ends=[shape.eos, *shape.stops])
    encoder = Encoder(tokenizer, choice, max_length=1 << 16, templates=templates)
    chats = _chats["conversations"](shape.ends[0], shape.call_id)
    for name in names:
        messages, tools = chats[name]
        oracle = _oracle["Oracle"](
            tokenizer,
            shape.as_read(messages),
            tools=tools,
            variables=shape.variables,
            ends=shape.ends,
            thinks=shape.thinks,
        )
        record = Record(channel="c", where=name, messages=tuple(messages), tools=tuple(tools))
        try:
            examples = encoder.encode(record).examples
        except PosttrainError as error:
            yield Row(name, str(error), [], oracle)
            continue
        samples = [(e.input_ids_L.tolist(), e.weight_L.tolist()) for e in examples]
        yield Row(name, "", samples, oracle)


def judge(shape: Any, names: Sequence[str], form: Form) -> Iterator[tuple[str, Outcome]]:
    """Encode some conversations with a shape, and ask the oracle about what was taken."""
    for name, refusal, samples, oracle in encode(shape, names, form):
        yield name, Outcome(refusal, "" if refusal else oracle.fault(samples))


def matrix() -> str:
    """The table: a row for each shape, a column for each group of conversations."""
    shapes = read_shapes()
    num_agreed = num_refused = 0
    rows = []
    for shape in shapes:
        found = {form: dict(judge(shape, CONVERSATIONS, form)) for form in FORMS}
        outcomes = [outcome for by_name in found.values() for outcome in by_name.values()]
        num_agreed += sum(outcome == AGREED for outcome in outcomes)
        num_refused += sum(bool(outcome.refusal) for outcome in outcomes)
        cells = [_cell(found, names) for names in GROUPS.values()]
        rows.append(f"| {' | '.join([_titled(shape), *cells])} |")
    num_names = len({shape.name for shape in shapes})
    lines = [
        f"{num_names} shapes, {len(shapes)} with their variables and options; {len(CONVERSATIONS)} "
        f"conversations in {len(FORMS)} forms: {num_agreed} agree, {num_refused} are refused, "
        f"{len(shapes) * len(CONVERSATIONS) * len(FORMS) - num_agreed - num_refused} disagree.",
        "",
        *(f"- {group}: {', '.join(map(_numbered, names))}" for group, names in GROUPS.items()),
        "",
        f"| {' | '.join(['shape', *GROUPS])} |",
        "|---" * (len(GROUPS) + 1) + "|",
        *rows,
    ]
    return "\n".join(lines)


def _titled(shape: Any) -> str:
    """The name; where it is the shape as it is, with what is particular about it."""
    notes = shape.notes.replace("|", "\\|") if shape.title == shape.name else ""
    return f"`{shape.title}`" + (f": {notes}" if notes else "")


def _cell(found: dict[Form, dict[str, Outcome]], names: Sequence[str]) -> str:
    """That all agree, or each reason of a refusal with the conversations that it meets."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for name in names:
        reasons = {
            form.value: _reason(by_name[name])
            for form, by_name in found.items()
            if by_name[name] != AGREED
        }
        for reason in dict.fromkeys(reasons.values()):
            meets = [form for form in reasons if reasons[form] == reason]
            only = "" if len(meets) == len(found) else f" (form={meets[0]})"
            grouped.setdefault((reason, only), []).append(name)
    parts = []
    for (reason, only), refused in grouped.items():
        numbers = (_numbered(name).partition(" ")[0] for name in refused)
        whose = "all" if refused == list(names) else ", ".join(numbers)
        parts.append(f"{whose}{only}: {reason}")
    return "<br>".join(parts) or "agree"


def _numbered(name: str) -> str:
    return f"{CONVERSATIONS.index(name) + 1} {name.replace('_', ' ')}"


def _reason(outcome: Outcome) -> str:
    if outcome.fault:
        return "**disagree**"
    for pattern, words in _REASONS.items():
        if re.search(pattern, outcome.refusal):
            return words
    return outcome.refusal.splitlines()[0].partition(": ")[2][:60].replace("|", "\\|")


def with_section(page: str, table: str) -> str:
    """The page with the table between its two marks, which stand at its end at first."""
    section = f"{BEGIN}\n\n{table}\n\n{END}\n"
    before, begin, rest = page.partition(BEGIN)
    if begin:
        return before + section + rest.partition(END)[2].removeprefix("\n")
    return f"{page.rstrip()}\n\n## Templates that were tried\n\n{_INTRODUCTION}\n\n{section}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", help="print their outcomes, and write nothing")
    args = parser.parse_args()
    if not args.shapes:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_section(page, matrix()), encoding="utf-8")
    for shape in read_shapes():
        if shape.name in args.shapes:
            for form in FORMS:
                for name, outcome in judge(shape, CONVERSATIONS, form):
                    print(shape.title, form.value, name, "".join(outcome) or "agree")


if __name__ == "__main__":
    main()
