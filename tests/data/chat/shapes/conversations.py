"""The conversations that every shape is tried with (loaded by path: tests/ is no package).

Each message has words that stand in no other and in no template, so that what is supervised shows
whose it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Finds {what}",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
    for name, what in (("find_weather", "the sky of a place"), ("find_people", "its people"))
]
# Group of the printed matrix -> its conversations.
GROUPS = {
    "plain": ("single", "three_turns", "unicode"),
    "system": ("system", "system_three_turns"),
    "order": ("ends_with_user", "assistant_first", "two_in_a_row"),
    "text": ("empty", "white_space", "quoted_end"),
    "thoughts": ("thoughts", "thoughts_each_turn", "thoughts_inline", "thoughts_last"),
    "tools": ("call", "parallel_calls", "call_with_text", "tools_unused"),
}


class Chat(NamedTuple):
    """One row: messages, and the tools that it lists."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


def conversations(end: str, call_id: str) -> dict[str, Chat]:
    """All of them by name.

    Args:
        end: the token that ends a turn, which one of them quotes.
        call_id: pattern of the ids of calls.
    """
    first = [_user("Where does Quillon live?"), _say("Quillon lives in Ostrava.")]
    second = [_user("And his brother Tarkin?"), _say("Tarkin moved to Plovdiv.")]
    third = [_user("Who came after them?"), _say("Nobody, the house stands empty.")]
    system = {"role": "system", "content": "Answer like a chronicler."}
    return {
        **_texts(first, second, third, system, end),
        **_thinking(first, second, third),
        **_calling(call_id),
    }


def _texts(
    first: list[dict[str, Any]],
    second: list[dict[str, Any]],
    third: list[dict[str, Any]],
    system: dict[str, Any],
    end: str,
) -> dict[str, Chat]:
    found = {
        "single": first,
        "three_turns": [*first, *second, *third],
        "unicode": [_user("Größe des Turms?"), _say("塔高 🗼 — naïve Ωmega\u00a0½"), *second],
        "system": [system, *first],
        "system_three_turns": [system, *first, *second, *third],
        "ends_with_user": [*first, _user("Thanks, goodbye!")],
        "assistant_first": [_say("Welcome, traveller."), *first],
        "two_in_a_row": [*first, _say("Ask further if needed."), *second],
        "empty": [_user("Keep silent now."), _say(""), *second],
        "white_space": [first[0], _say(" \n  Quillon lives\n\n in Ostrava. \n\n"), *second],
        "quoted_end": [first[0], _say(f"Type {end} in Ostrava, then stop."), *second],
    }
    return {name: Chat(messages, []) for name, messages in found.items()}


def _thinking(
    first: list[dict[str, Any]], second: list[dict[str, Any]], third: list[dict[str, Any]]
) -> dict[str, Chat]:
    one, two, three = (
        [turns[0], {**turns[1], "reasoning_content": thought}]
        for turns, thought in (
            (first, "Recall the registry of 1911."),
            (second, "Compare\n\nboth passports."),
            (third, "Count every chimney."),
        )
    )
    inline = _say("<think>\nRecall the registry of 1911.\n</think>\n\nQuillon lives in Ostrava.")
    found = {
        "thoughts": one,
        "thoughts_each_turn": [*one, *two, *three],
        "thoughts_inline": [first[0], inline],
        "thoughts_last": [*first, *second, *three],
    }
    return {name: Chat(messages, []) for name, messages in found.items()}


def _calling(call_id: str) -> dict[str, Chat]:
    ask, answer = _user("Is Ostrava sunny today?"), _say("It rains there, bring boots.")
    weather = _call(call_id, 0, "find_weather", {"days": 3, "place": "Ostrava-Jih"})
    people = _call(call_id, 1, "find_people", {"place": "Vysoke Myto"})
    rain, crowd = _result(weather, "drizzle 11"), _result(people, "about 12000")
    found = {
        "call": [ask, _say("", tool_calls=[weather]), rain, answer],
        "parallel_calls": [ask, _say("", tool_calls=[weather, people]), rain, crowd, answer],
        "call_with_text": [ask, _say("Let me look outside.", tool_calls=[weather]), rain, answer],
        "tools_unused": [ask, answer],
    }
    return {name: Chat(messages, TOOLS) for name, messages in found.items()}


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _say(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _call(call_id: str, index: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "type": "function",
        "id": call_id.format(name=name, index=index),
        "function": function,
    }


def _result(call: dict[str, Any], content: str) -> dict[str, Any]:
    name = call["function"]["name"]
    return {"role": "tool", "content": content, "tool_call_id": call["id"], "name": name}
