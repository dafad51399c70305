"""Rows of answers to one prompt: pairs, rankings, answers with scores or with a label.

row -> (prompt, answers), each answer with what it is worth
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from posttrain_dist.data.formats.pairs import read_prompt, unweighted
from posttrain_dist.data.formats.turns import read_text, read_turns
from posttrain_dist.data.prefix import common_prefix_length
from posttrain_dist.data.read.bad_row import BadRow, bad_field, kind
from posttrain_dist.data.read.json_lines import load
from posttrain_dist.flow import Answer, Message

Messages = tuple[Message, ...]
# How HH-RLHF writes a conversation: as one text.
_TRANSCRIPT = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_MOST = 1e9  # of a score: what float32 still tells apart from its neighbours
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Answered(NamedTuple):
    """A prompt and the answers to it."""

    prompt: Messages
    answers: tuple[Answer, ...]


def read_preference(row: dict[str, Any]) -> Answered:
    """The better answer, then the worse one.

    Where the answers are whole conversations, their common beginning is the prompt. The margin is
    that of the row. Other scores of it are not read: their scale is not that of rewards.

    Raises:
        BadRow: there is no prompt, the answers are equal, one is empty or no answer to the
            prompt, or the margin is no such number.
    """
    chosen, rejected = (_answer(row[name], name) for name in ("chosen", "rejected"))
    shared = common_prefix_length(chosen, rejected)
    if chosen == rejected:
        raise bad_field("rejected", "is the same as chosen", "remove the row")
    given = row.get("prompt")
    if given is None:
        prompt = chosen[:shared]
        if not prompt:
            fix = (
                "add prompt, or write both as conversations that begin with the same turns; where "
                "another key holds the prompt, set 'data.columns={prompt: YOURS}'"
            )
            raise bad_field("chosen", "has no prompt: it shares no turn with rejected", fix)
    else:
        prompt = read_prompt(row)
        shared = _repeats_prompt(prompt, chosen[:shared], isinstance(given, str))
        if shared:
            prompt = chosen[:shared]
    answers = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    for name, answer in answers.items():
        _check_answer(answer, name)
    better = Answer(answers["chosen"], 1.0, _margin(row))
    return Answered(_with_system(row, prompt), (better, Answer(answers["rejected"], 0.0)))


def read_ranking(row: dict[str, Any]) -> Answered:
    """Answers from the best to the worst, or in any order with `ranks` (1 is the best).

    Each is worth the number of answers that it is better than.

    Raises:
        BadRow: there are fewer than two, two are equal, or the ranks are no such numbers.
    """
    prompt, found = _prompt_and_answers(row)
    if len(found) < 2:
        what = f"has {len(found)} answer, and a ranking compares two at least"
        raise bad_field("answers", what, "remove the row")
    for i, answer in enumerate(found):
        if answer in found[:i]:
            what = f"is the same as answers[{found.index(answer)}]"
            raise bad_field(f"answers[{i}]", what, "remove one of them")
    ranks = [float(i) for i in range(len(found))]
    if row.get("ranks") is not None:
        ranks = _numbers(row["ranks"], "ranks", len(found))
        if len(set(ranks)) == 1:
            raise bad_field("ranks", "are all the same: nothing is compared", "remove the row")
    values = [float(sum(other > rank for other in ranks)) for rank in ranks]
    return Answered(prompt, tuple(map(Answer, found, values)))


def read_scored_answers(row: dict[str, Any]) -> Answered:
    """Answers, each with its score.

    Raises:
        BadRow: they are not as many as scores, or a score is no finite number.
    """
    prompt, found = _prompt_and_answers(row)
    scores = _numbers(row["scores"], "scores", len(found))
    return Answered(prompt, tuple(map(Answer, found, scores)))


def read_scored_completion(row: dict[str, Any]) -> Answered:
    """One answer with a score.

    Raises:
        BadRow: the score is no finite number, or there is no answer.
    """
    prompt = _with_system(row, read_prompt(row))
    answer = _beside_prompt(prompt, row["completion"], "completion")
    return Answered(prompt, (Answer(answer, _number(row["score"], "score")),))


def read_unpaired(row: dict[str, Any]) -> Answered:
    """One answer with a label: whether it is desirable.

    Raises:
        BadRow: the label is neither true nor false (nor 1 or 0), or there is no answer.
    """
    prompt = _with_system(row, read_prompt(row))
    answer = _beside_prompt(prompt, row["completion"], "completion")
    label = row["label"]
    value = _of_cell(label.lower()) if isinstance(label, str) else label
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        fix = "write true (such an answer is wanted) or false"
        raise bad_field("label", f"is {label!r}, expected true or false", fix)
    return Answered(prompt, (Answer(answer, float(value)),))


# ------------------------------------------------------------------------------------ the parts


def _answer(value: Any, name: str) -> Messages:
    """The turns of an answer, or of a whole conversation that ends with one."""
    if not isinstance(value, str | list):
        fix = "write the answer as text, or as a list of turns that begins with the assistant's"
        raise bad_field(name, f"is {kind(value)}, expected text or a list of turns", fix)
    if not isinstance(value, str):
        return unweighted(read_turns(value, name), name)
    if _TRANSCRIPT.match(value) and value.lstrip().startswith("Human:"):
        return _transcript(value, name)
    read_text(value, name, empty=False)
    return ({"role": "assistant", "content": value},)


def _transcript(text: str, name: str) -> Messages:
    """A conversation that is written as one text, each turn behind `Human:` or `Assistant:`."""
    _, *parts = _TRANSCRIPT.split(text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    found = tuple({"role": _ROLES[who], "content": said.strip()} for who, said in turns)
    if found[-1]["role"] != "assistant":
        raise bad_field(name, "ends with a turn of the human", "end it with the answer")
    return found


def _check_answer(answer: Messages, name: str) -> None:
    """Refuse what is no answer to the prompt before it."""
    if not answer or answer[0]["role"] != "assistant":
        what = "has no assistant turn after the prompt"
        if answer:
            what = f"goes on after the prompt with a {answer[0]['role']} turn"
        raise bad_field(name, what, "write answers to one and the same prompt")
    if answer[-1]["role"] != "assistant":
        what = f"ends with a {answer[-1]['role']} turn"
        raise bad_field(name, what, "end each answer with what the assistant says")
    for message in answer:
        is_said = str(message.get("content") or "").strip() or message.get("tool_calls")
        if message["role"] == "assistant" and not is_said and "reasoning_content" not in message:
            raise bad_field(name, "is an empty answer", "remove the row, or write what is said")


def _prompt_and_answers(row: dict[str, Any]) -> tuple[Messages, list[Messages]]:
    prompt, answers = _with_system(row, read_prompt(row)), row["answers"]
    if not isinstance(answers, list) or not answers:
        what = f"is {'an empty list' if answers == [] else kind(answers)}, expected a list"
        raise bad_field("answers", what, 'write ["...", "..."], or a list of turns for each')
    if isinstance(answers[0], dict) and "role" in answers[0]:
        what = "is one list of turns, expected a list of answers"
        raise bad_field("answers", what, "put each answer into a list of its own")
    return prompt, [_beside_prompt(prompt, a, f"answers[{i}]") for i, a in enumerate(answers)]


def _beside_prompt(prompt: Messages, value: Any, name: str) -> Messages:
    """An answer, which may repeat the prompt."""
    if not isinstance(value, str | list):
        fix = "write text, or a list of turns"
        raise bad_field(name, f"is {kind(value)}, expected text or a list of turns", fix)
    answer = _answer(value, name)
    if answer[: len(prompt)] == prompt:
        answer = answer[len(prompt) :]
    _check_answer(answer, name)
    return answer


def _with_system(row: dict[str, Any], prompt: Messages) -> Messages:
    """The prompt behind the system's text, where it stands beside it."""
    system = row.get("system")
    if system is None or not read_text(system, "system"):
        return prompt
    if prompt[0]["role"] == "system":
        raise bad_field("system", "stands beside a system turn", "keep one of them")
    return ({"role": "system", "content": system}, *prompt)


def _repeats_prompt(prompt: Messages, shared: Messages, text: bool) -> int:
    """How many turns of the answers repeat the prompt: all that they share, or none."""
    if not shared or shared[0]["role"] == "assistant":
        return 0
    repeats = shared[: len(prompt)] == prompt
    if text:  # the last question, of a conversation that the answers hold in full
        questions = [m["content"].strip() for m in shared if m["role"] == "user"]
        repeats = prompt[0]["content"].strip() in questions
    if not repeats:
        fix = "leave prompt out, or write the same turns"
        raise bad_field("prompt", "is not how chosen and rejected begin", fix)
    return len(shared)


# ---------------------------------------------------------------------------------- the numbers


def _margin(row: dict[str, Any]) -> float:
    given = row.get("margin")
    if given is not None and given == given:  # not the null of a table
        margin = _number(given, "margin")
        if margin < 0:
            raise bad_field("margin", f"is {given!r}", "write 0 or more, or swap the answers")
        return margin
    return 0.0


def _numbers(value: Any, name: str, count: int) -> list[float]:
    if not isinstance(value, list):
        raise bad_field(name, f"is {kind(value)}, expected a list of numbers", "[1, 2]")
    if len(value) != count:
        what = f"has {len(value)} numbers, and there are {count} answers"
        raise bad_field(name, what, "write one for each answer")
    return [_number(item, f"{name}[{i}]") for i, item in enumerate(value)]


def _number(value: Any, name: str) -> float:
    """A finite number, which a cell of CSV holds as text."""
    found = _of_cell(value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise bad_field(name, f"is {kind(value)}, expected a number", "write a number")
    if not abs(found) <= _MOST:  # nor is NaN
        raise bad_field(name, f"is {value!r}", f"write a number up to {_MOST:,.0f}")
    return float(found)


def _of_cell(text: str) -> Any:
    try:
        return load(text.encode())
    except BadRow:
        return text
