"""Shipped templates beside a writer of each format in plain Python: text, marks and samples."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import Form, Template
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.data.chat.rendering.template_choice import load_templates
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Example, Record

writers = runpy.run_path(str(Path(__file__).with_name("family_writers.py")))
WRITERS, TOOL, joined = (writers[name] for name in ("WRITERS", "TOOL", "joined"))
Message = dict[str, Any]


def ask(content: str) -> Message:
    return {"role": "user", "content": content}


def say(content: str, *calls: Message, **rest: Any) -> Message:
    return {
        "role": "assistant",
        "content": content,
        **({"tool_calls": calls} if calls else {}),
    } | rest


def call(number: int, **arguments: Any) -> Message:
    function = {"name": "add", "arguments": arguments}
    return {"type": "function", "id": f"abcdefg{number:02}", "function": function}


def result(number: int, content: str) -> Message:
    return {"role": "tool", "content": content, "tool_call_id": f"abcdefg{number:02}"}


SYSTEM = {"role": "system", "content": "Be kind"}
CALL = call(1, a=1, unit="km", more=[2.5, -3], how={"exact": True, "Round": None})
CONVERSATIONS: dict[str, list[Message]] = {
    "single": [ask("Hi"), say("Hello\nthere")],
    "system": [SYSTEM, ask("Hi"), say("Hello"), ask("More"), say("Bye")],
    "thoughts": [
        *(ask("Hi"), say("Hello", reasoning_content="why\nnot")),
        *(ask("More"), say("<think>\nso it is\n</think>\n\nBye")),
    ],
    "call": [SYSTEM, ask("Hi"), say("", CALL), result(1, "2"), say("Bye")],
    "thoughtful call": [
        *(ask("Hi"), say("", CALL, reasoning_content="a tool"), result(1, "2")),
        *(say("Bye", reasoning_content="done"), ask("More"), say("Two", reasoning_content="sum")),
    ],
    "words beside a call": [ask("Hi"), say("Let me see.", CALL), result(1, "2"), say("Bye")],
    "two calls": [
        *(ask("Hi"), say("", CALL, call(2, a=4)), result(1, "2"), result(2, '{"x": 5}')),
        *(say("", call(3)), result(3, ""), say("Bye"), ask("More"), say("Two")),
    ],
    "no answer to a call": [ask("Hi"), say("", CALL), result(1, "2"), ask("More"), say("Bye")],
}
PLAIN = {"single", "system"}
THOUGHTS = {*PLAIN, "thoughts"}
ALL = set(CONVERSATIONS)
KNOWN = {
    "phi4": PLAIN,
    "r1": THOUGHTS,
    "granite": ALL - {"thoughts", "thoughtful call"},
    "qwen3.5": ALL,
    "glm": ALL,
    "gemma4": ALL,
    "cohere": ALL - {"words beside a call"},
    "gpt-oss": ALL - {"two calls"},
}
OFF = {"enable_thinking": False}
VARIABLES: dict[str, list[dict[str, Any]]] = {
    "qwen3.5": [{}, OFF],
    "glm": [{}, OFF],
    "gemma4": [{}, {"enable_thinking": True}],
    "gpt-oss": [{}, {"reasoning_effort": "high", "current_date": "2031-05-04"}],
}
CASES = [
    (family, name, variables)
    for family, known in KNOWN.items()
    for name in CONVERSATIONS
    for variables in VARIABLES.get(family, [{}])
    if name in known
]


class Case:
    """A conversation in a format: as the writer has it, and as the template."""

    def __init__(self, family: str, name: str, variables: dict[str, Any], tokenizer: Any) -> None:
        self.messages, self.variables, self.tokenizer = CONVERSATIONS[name], variables, tokenizer
        self.tools = [TOOL] if any("tool_calls" in m for m in self.messages) else []
        self.family, self._writer = family, WRITERS[family]
        self.turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]

    def written(self, length: int, prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Text of the first messages, and what of it the assistant says."""
        parts = self._writer(self.messages[:length], bool(self.tools), prompt, **self.variables)
        text, runs = joined(parts)
        return text, runs

    def encode(self, form: Form) -> list[Example]:
        choice = Template(name=self.family, variables=self.variables, form=form)
        row = Record(
            channel="c",
            where="rows.jsonl:7",
            messages=tuple(self.messages),
            tools=tuple(self.tools),
        )
        return Encoder(self.tokenizer, choice, max_length=9999).encode(row).examples

    def decoded(self, example: Example) -> tuple[str, list[str]]:
        """The text of a sample, and the runs of it that have a weight."""
        runs: list[list[int]] = [[]]
        for token, weight in zip(example.input_ids_L, example.weight_L, strict=True):
            if weight:
                runs[-1].append(int(token))
            elif runs[-1]:
                runs.append([])
        said = [self.tokenizer.decode(run) for run in runs if run]
        return self.tokenizer.decode(example.input_ids_L), said


@pytest.fixture(scope="module")
def case_of(family_tokenizer: Callable[..., Any]) -> Callable[..., Case]:
    tokenizer = cache(family_tokenizer)

    def make(family: str, name: str, variables: dict[str, Any]) -> Case:
        return Case(family, name, variables, tokenizer(family))

    return make


@pytest.mark.parametrize(("family", "name", "variables"), CASES)
def test_text_marks_and_prompts(
    family: str, name: str, variables: dict[str, Any], case_of: Callable[..., Case]
) -> None:
    case = case_of(family, name, variables)
    choice = Template(name=family, variables=variables)
    template = load_templates(choice, case.tokenizer).plain
    for length in range(1, len(case.messages) + 1):
        begun = case.messages[:length]
        text, runs = case.written(length)
        assert template.render_marked(begun, "w", case.tools, False, marks=True) == (text, runs)
        prompt, _ = case.written(length, prompt=True)
        asked = template.render(begun, "w", tools=case.tools, generation_prompt=True)
        assert asked == prompt
    theirs = case.tokenizer.apply_chat_template(
        case.messages,
        tools=case.tools,
        chat_template=template.source,
        tokenize=False,
        **variables,
    )
    assert theirs == text


@pytest.mark.parametrize(("family", "name", "variables"), CASES)
def test_samples(
    family: str, name: str, variables: dict[str, Any], case_of: Callable[..., Case]
) -> None:
    """One a turn, and the whole conversation where later turns leave the earlier as they were."""
    case = case_of(family, name, variables)
    text, runs = case.written(len(case.messages))
    prompts = [case.written(turn, prompt=True)[0] for turn in case.turns]
    alone = [case.written(turn + 1) for turn in case.turns]
    said = [upto[slice(*spans[-1])] for upto, spans in alone]
    if any(p.endswith("\n") and s[0] == "\n" for p, s in zip(prompts, said, strict=True)):
        # The line break that closes an empty thought merges with the one that opened it.
        assert family in ("r1", "qwen3.5") and variables != OFF
        return
    if all(upto.startswith(p) for p, (upto, _) in zip(prompts, alone, strict=True)):
        samples = [case.decoded(sample) for sample in case.encode(Form.turns)]
        assert [runs for _, runs in samples] == [[words] for words in said]
        for (sample, _), (upto, spans) in zip(samples, alone, strict=True):
            assert sample.rstrip() == upto.rstrip()
            assert sample.startswith(upto[: spans[-1][1]])
    else:  # the prompt closes a thought, and the row has one
        assert variables == OFF and "thought" in name
        with pytest.raises(DataError, match=r"rows\.jsonl:7: the inference prompt of messages"):
            case.encode(Form.turns)
    is_kept = [
        text.startswith(p) and text.startswith(upto[: spans[-1][1]])
        for p, (upto, spans) in zip(prompts, alone, strict=True)
    ]
    if all(is_kept):
        (sample,) = case.encode(Form.conversation)
        assert case.decoded(sample) == (text, [text[slice(*run)] for run in runs])
    else:
        with pytest.raises(DataError, match=r"rows\.jsonl:7: "):
            case.encode(Form.conversation)
