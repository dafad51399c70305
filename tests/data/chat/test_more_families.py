"""Shipped templates beside a writer of each format in plain Python: text, marks and samples."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import Form, Template, Thinking
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.data.chat.rendering.template_choice import load_templates
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Example, Record

writers = runpy.run_path(str(Path(__file__).with_name("family_writers.py")))
WRITERS, TOOL, joined = (writers[name] for name in ("WRITERS", "TOOL", "joined"))
Message = dict[str, Any]
Sample = tuple[str, list[str]]  # text, and the runs of it that have a weight


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
    pytest.param(
        family, name, variables, id="-".join([family, name, *map(str, variables.values())])
    )
    for family, known in KNOWN.items()
    for name in CONVERSATIONS
    for variables in VARIABLES.get(family, [{}])
    if name in known
]


class Family:
    """A format with the variables of a run: its writer, its template and its samples."""

    def __init__(self, name: str, variables: dict[str, Any], tokenizer: Any) -> None:
        self.tokenizer, self._writer, self._variables = tokenizer, WRITERS[name], variables
        choices = {
            # What closes a thought is the model's own, also where it had none.
            form: Template(name=name, variables=variables, form=form, thinking=Thinking.close)
            for form in Form
        }
        self._encoders = {f: Encoder(tokenizer, choices[f], max_length=9999) for f in Form}
        self.template = load_templates(choices[Form.turns], tokenizer).plain

    def write(
        self, messages: list[Message], tools: list[Message], prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and what of it the assistant says."""
        text, runs = joined(self._writer(messages, bool(tools), prompt, **self._variables))
        return text, runs

    def encode(self, messages: list[Message], tools: list[Message], form: Form) -> list[Sample]:
        row = Record(
            channel="c", where="rows.jsonl:7", messages=tuple(messages), tools=tuple(tools)
        )
        return [self._decode(example) for example in self._encoders[form].encode(row).examples]

    def _decode(self, example: Example) -> Sample:
        runs: list[list[int]] = [[]]
        for token, weight in zip(example.input_ids_L, example.weight_L, strict=True):
            if weight:
                runs[-1].append(int(token))
            elif runs[-1]:
                runs.append([])
        said = [self.tokenizer.decode(run) for run in runs if run]
        return self.tokenizer.decode(example.input_ids_L), said


@pytest.fixture(scope="module")
def family_of(family_tokenizer: Callable[..., Any]) -> Callable[..., Family]:
    made: dict[str, Family] = {}
    tokenizer_of = cache(family_tokenizer)

    def get(name: str, variables: dict[str, Any]) -> Family:
        key = name + repr(variables)
        if key not in made:
            made[key] = Family(name, variables, tokenizer_of(name))
        return made[key]

    return get


def tools_of(messages: list[Message]) -> list[Message]:
    return [TOOL] if any("tool_calls" in m for m in messages) else []


@pytest.mark.parametrize(("name", "chat", "variables"), CASES)
def test_text_marks_and_prompts(
    name: str, chat: str, variables: dict[str, Any], family_of: Callable[..., Family]
) -> None:
    family, messages = family_of(name, variables), CONVERSATIONS[chat]
    template, tools = family.template, tools_of(messages)
    for length in range(1, len(messages) + 1):
        begun = messages[:length]
        written = family.write(begun, tools)
        assert template.render_marked(begun, "w", tools, False, marks=True) == written
        asked = template.render(begun, "w", tools=tools, generation_prompt=True)
        assert asked == family.write(begun, tools, prompt=True)[0]
    theirs = family.tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template.source, tokenize=False, **variables
    )
    assert theirs == written[0]


@pytest.mark.parametrize(("name", "chat", "variables"), CASES)
def test_samples(
    name: str, chat: str, variables: dict[str, Any], family_of: Callable[..., Family]
) -> None:
    """One a turn, and the whole conversation where later turns leave the earlier as they were."""
    family, messages = family_of(name, variables), CONVERSATIONS[chat]
    tools = tools_of(messages)
    text, runs = family.write(messages, tools)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    prompts = [family.write(messages[:turn], tools, prompt=True)[0] for turn in turns]
    alone = [family.write(messages[: turn + 1], tools) for turn in turns]
    ended = [upto[: spans[-1][1]] for upto, spans in alone]  # without white space behind the end
    said = [upto[slice(*spans[-1])] for upto, spans in alone]
    if any(p.endswith("\n") and s[0] == "\n" for p, s in zip(prompts, said, strict=True)):
        # The line break that closes an empty thought merges with the one that opened it.
        assert name in ("r1", "qwen3.5") and variables != OFF
        return
    if all(upto.startswith(p) for p, upto in zip(prompts, ended, strict=True)):
        samples = family.encode(messages, tools, Form.turns)
        assert [runs for _, runs in samples] == [[words] for words in said]
        assert [sample.rstrip() for sample, _ in samples] == [upto.rstrip() for upto in ended]
    else:  # the prompt closes a thought, and the row has one
        assert variables == OFF and "thought" in chat
    if all(text.startswith(begun) for begun in (*prompts, *ended)):
        whole = (text, [text[slice(*run)] for run in runs])
        assert family.encode(messages, tools, Form.conversation) == [whole]
    else:
        with pytest.raises(DataError, match=r"rows\.jsonl:7: "):
            family.encode(messages, tools, Form.conversation)


@pytest.mark.parametrize(
    ("name", "messages", "what"),
    [
        ("phi4", [ask("Hi"), say("", CALL), result(1, "2"), say("Bye")], "no role tool"),
        ("r1", [ask("Hi"), say("", CALL)], "no place for tools"),
        ("r1", [ask("Hi"), SYSTEM, say("Bye")], "no role system here"),
        ("gpt-oss", [ask("Hi"), say("", CALL, call(2))], "one tool call a turn"),
        ("cohere", [ask("Hi"), say("Let me see.", CALL)], r"not write all of .*\.content"),
        ("granite", [ask("Hi"), say("Bye", reasoning_content="why")], "reasoning_content"),
        # Nobody says whose turn it is next, so nothing would stop the model.
        ("glm", [ask("Hi"), say("Hello"), say("Bye")], r"end-of-turn token .*messages\[1\]"),
    ],
)
def test_what_a_format_has_no_place_for(
    name: str, messages: list[Message], what: str, family_of: Callable[..., Family]
) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:7: .*{what}"):
        family_of(name, {}).encode(messages, [], Form.conversation)
