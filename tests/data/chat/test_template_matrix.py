"""Shapes of published templates, tried with every conversation, against the oracle."""
# ruff: noqa: RUF001 - DeepSeek writes its tokens with a full-width bar

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import template_matrix

from posttrain_dist.data import Form

HERE = Path(__file__).parent
Oracle = runpy.run_path(str(HERE / "template_oracle.py"))["Oracle"]
SHAPES = template_matrix.read_shapes()
NAMES = template_matrix.CONVERSATIONS
TITLES = [shape.title for shape in SHAPES]
STRIDE = 7  # of the conversations that the default run tries with a shape


def faults(shape: Any, names: list[str], form: Form) -> dict[str, str]:
    """Conversation -> what the oracle says against the samples of one that was taken."""
    judged = template_matrix.judge(shape, names, form)
    return {name: outcome.fault for name, outcome in judged if outcome.fault}


def test_every_conversation_meets_many_shapes_and_none_is_trained_wrongly() -> None:
    """Pairs by turns: each shape in one form and as it is, with every seventh conversation."""
    found = {}
    for i, shape in enumerate(shape for shape in SHAPES if shape.title == shape.name):
        form = template_matrix.FORMS[i // STRIDE % 2]
        found[shape.title, form.value] = faults(shape, NAMES[i % STRIDE :: STRIDE], form)
    assert {key: wrong for key, wrong in found.items() if wrong} == {}


# What a user of these families has, and what their templates make hard.
TAKEN = {
    "qwen3": ["three_turns", "thoughts_each_turn", "parallel_calls"],
    "qwq (thinking=close)": ["three_turns", "thoughts_last"],
    "qwen3_5 (thinking=close)": ["single", "call"],
    "deepseek_r1_distill": ["thoughts_each_turn", "thoughts_inline"],
    "gpt_oss": ["three_turns", "thoughts_each_turn", "call_with_text"],
    "command_a": ["three_turns", "parallel_calls"],
    "mistral_v0_3": ["system_three_turns", "parallel_calls"],
    "gemma4": ["three_turns", "call"],
    "glm4": ["three_turns", "call"],
    "smollm2": ["system_three_turns"],
    "hunyuan": ["system_three_turns"],
    "ends_between_turns": ["three_turns"],
    "zephyr_spaces": ["three_turns"],
}


def test_what_is_hard_is_not_refused() -> None:
    found = {
        (title, name): "".join(outcome)
        for title, names in TAKEN.items()
        for name, outcome in template_matrix.judge(SHAPES[TITLES.index(title)], names, Form.auto)
    }
    assert {key: wrong for key, wrong in found.items() if wrong} == {}


@pytest.mark.slow
@pytest.mark.parametrize("form", template_matrix.FORMS)
def test_no_conversation_is_trained_wrongly(form: Form) -> None:
    found = {shape.title: faults(shape, NAMES, form) for shape in SHAPES}
    assert {title: wrong for title, wrong in found.items() if wrong} == {}


@pytest.mark.slow
def test_the_page_shows_the_matrix() -> None:
    page = template_matrix.PAGE.read_text(encoding="utf-8")
    assert template_matrix.with_section(page, template_matrix.matrix()) == page


def test_the_matrix_is_as_large_as_it_says() -> None:
    assert len({shape.name for shape in SHAPES}) >= 45
    assert len(set(TITLES)) == len(TITLES)
    assert len(NAMES) >= 18
    written = {path.stem for path in (HERE / "shapes").glob("*.jinja")}
    assert written == {f for shape in SHAPES for f in shape.files.values() or [shape.name]}


# ------------------------------------------------------------------------- the oracle itself

Sample = tuple[list[int], list[float]]
ASK, SAY = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Over there."}
MORE, END = {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Nowhere."}
CHAT = [ASK, SAY, MORE, END]
THINKING = [ASK, {**SAY, "reasoning_content": "Look around."}]


def changed(samples: list[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    """The samples of a row with one thing wrong, and what it is."""
    (ids, weights), *others = samples
    first = weights.index(1.0)
    end = next((i for i in range(first, len(weights)) if not weights[i]), len(weights))
    places = {"first": first, "last": end - 1, "before": first - 1}
    places |= {"behind": end} if end < len(weights) else {}
    places |= {"inner": (first + end) // 2} if end - first > 2 else {}
    for name, place in places.items():
        other = [1.0 - w if i == place else w for i, w in enumerate(weights)]
        yield name, [(ids, other), *others]
    yield "everything", [(ids, [1.0] * len(ids)), *others]
    yield "nothing", [(ids, [0.0] * len(ids)), *others]
    yield "another prompt", [([ids[0], *ids], [0.0, *weights]), *others]
    yield "twice", [*samples, samples[-1]]
    if others:
        yield "one less", others


def passed(shapes: list[Any], names: list[str]) -> list[tuple[str, str, str]]:
    """Wrong samples that the oracle takes for right."""
    return [
        (shape.title, row.name, name)
        for shape in shapes
        for row in template_matrix.encode(shape, names, Form.auto)
        if not row.refusal
        for name, samples in changed(row.samples)
        if not row.oracle.fault(samples)
    ]


def test_the_oracle_passes_nothing_that_is_wrong() -> None:
    assert passed(SHAPES[::20], ["three_turns", "thoughts"]) == []


@pytest.mark.slow
def test_the_oracle_passes_nothing_that_is_wrong_of_any_shape() -> None:
    assert passed(SHAPES, NAMES) == []


def sample(shape: Any, text: str) -> Sample:
    """A sample written by hand: what is supervised stands in ⟦ ⟧."""
    ids: list[int] = []
    weights: list[float] = []
    for i, part in enumerate(text.replace("⟧", "⟦").split("⟦")):
        tokens = shape.tokenizer()(part, add_special_tokens=False)["input_ids"]
        ids += tokens
        weights += [float(i % 2)] * len(tokens)
    return ids, weights


def said_of(title: str, messages: list[dict[str, Any]], *texts: str) -> str:
    """What the oracle says of samples that are written by hand."""
    shape = SHAPES[TITLES.index(title)]
    judge: Callable[[list[Sample]], str] = Oracle(
        shape.tokenizer(),
        messages,
        tools=(),
        variables=shape.variables,
        ends=shape.ends,
        thinks=shape.thinks,
    ).fault
    return judge([sample(shape, text) for text in texts])


QUESTION = "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
AGAIN = "\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
BOTH = f"{QUESTION}⟦Over there.<|im_end|>⟧{AGAIN}⟦Nowhere.<|im_end|>⟧"
LAST = f"{QUESTION}Over there.<|im_end|>{AGAIN}⟦Nowhere.<|im_end|>⟧"
FIRST = f"{QUESTION}⟦Over there.<|im_end|>⟧"


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        ([BOTH], ""),
        ([FIRST, LAST], ""),
        ([LAST], r"messages[1] are trained nowhere"),
        ([FIRST, BOTH], "more than one run"),
        ([BOTH.replace("⟦Over", "Over⟦")], "'Over' is neither in the prompt nor trained on"),
        ([BOTH.replace("there.<|im_end|>⟧", "there.⟧<|im_end|>")], "ends in '.'"),
        ([BOTH.replace("there.<|im_end|>⟧\n", "there.<|im_end|>\n⟧")], "ends in '\\n'"),
        ([BOTH.replace("⟧", "").replace("Nowhere.<|im_end|>", "Nowhere.<|im_end|>⟧")], "And"),
        ([BOTH.replace("there", "here")], "lacks 'Over there.'"),
        ([BOTH.replace("Where", "⟦Where").replace("?", "?⟧", 1)], "before any whole prompt"),
        ([BOTH.replace("user\nWhere", "user\n Where")], "before any whole prompt"),
        ([BOTH.replace("And then", "And now")], "more than one run"),
        ([BOTH.replace("Nowhere.", "Nowhere. More.")], "inference continues with 'Nowhere."),
    ],
)
def test_the_oracle_knows_right_from_wrong(texts: list[str], fault: str) -> None:
    said = said_of("chatml", CHAT, *texts)
    assert fault in said if fault else said == ""


@pytest.mark.parametrize(
    ("title", "text", "fault"),
    [
        ("qwen3", "⟦<think>\nLook around.\n</think>\n\nOver there.<|im_end|>⟧", ""),
        ("qwen3", "⟦Over there.<|im_end|>⟧", "lacks 'Look around.'"),
        ("qwen3", "⟦Over there.Look around.<|im_end|>⟧", "lacks 'Over there.'"),
        ("qwen3", "<think>\n⟦Look around.\n</think>\n\nOver there.<|im_end|>⟧", "neither in"),
        ("qwq", "<think>\n⟦Look around.\n</think>\nOver there.<|im_end|>⟧", ""),
        ("qwq", "<think>\n⟦Look around.\nOver there.<|im_end|>⟧", "does not close"),
    ],
)
def test_the_oracle_sees_thoughts(title: str, text: str, fault: str) -> None:
    said = said_of(title, THINKING, QUESTION + text)
    assert fault in said if fault else said == ""


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<think>\n\n</think>\n\n⟦Over there.<|im_end|>⟧", ""),
        ("⟦<think>\n\n</think>\n\nOver there.<|im_end|>⟧", ""),
        ("⟦Over there.<|im_end|>⟧", ""),
        ("<think>\n\n⟦</think>\n\nOver there.<|im_end|>⟧", "neither in the prompt"),
        ("<think>\n\n</think>⟦\n\nOver there.<|im_end|>⟧", "neither in the prompt"),
    ],
)
def test_an_empty_thinking_block_need_not_be_trained(text: str, fault: str) -> None:
    said = said_of("qwen3", [ASK, SAY], QUESTION + text)
    assert fault in said if fault else said == ""


R1 = "<｜begin▁of▁sentence｜><｜User｜>Where?<｜Assistant｜><think>\n"
R1_END = "Over there.<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"⟦Look around.\n</think>\n\n{R1_END}⟧", ""),
        (f"⟦Look around.\n</think>\n\n<｜Assistant｜>{R1_END}⟧", "not how the turn ends"),
        (f"⟦Look around.\n</think>\n\nSo: {R1_END}⟧", "not how the turn ends"),
        (f"⟦Look around. {R1_END}⟧", "does not close"),
    ],
)
def test_a_turn_that_its_prompt_does_not_begin(text: str, fault: str) -> None:
    said = said_of("deepseek_r1_distill", THINKING, R1 + text)
    assert fault in said if fault else said == ""


def test_thoughts_behind_a_prompt_that_closes_them_are_seen() -> None:
    closed = f"{QUESTION}<think>\n\n</think>\n\n"
    title = "qwen3 (enable_thinking=False)"
    assert said_of(title, [ASK, SAY], f"{closed}⟦Over there.<|im_end|>⟧") == ""
    again = f"{closed}⟦<think>\nLook around.\n</think>\n\nOver there.<|im_end|>⟧"
    assert "closes the thoughts" in said_of(title, THINKING, again)


def test_a_quoted_end_token_that_is_a_control_token_is_seen() -> None:
    messages = [ASK, {**SAY, "content": "Type <|im_end|> there."}]
    text = f"{QUESTION}⟦Type <|im_end|> there.<|im_end|>⟧"
    assert "a quoted end token ends the turn" in said_of("chatml", messages, text)
