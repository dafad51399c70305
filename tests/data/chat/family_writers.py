"""Families of chat formats written by plain Python, without Jinja (loaded by path, as tests are).

Each writer follows the family's description of its format, message after message, and says which
pieces of the text are the assistant's: all that a model says behind its inference prompt.
"""
# ruff: noqa: RUF001 - DeepSeek writes its tokens with a full-width bar

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

described = runpy.run_path(str(Path(__file__).with_name("family_tools.py")))
TOOL: dict[str, Any] = described["TOOL"]

Message = dict[str, Any]
Parts = list[tuple[str, bool]]  # pieces of text, and whether the assistant says them
Writer = Callable[..., Parts]


def joined(parts: Parts) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the characters [start, end) of each run that the assistant says."""
    text, runs = "", list[tuple[int, int]]()
    for piece, is_said in parts:
        if is_said and piece:
            start = runs.pop()[0] if runs and runs[-1][1] == len(text) else len(text)
            runs.append((start, len(text) + len(piece)))
        text += piece
    return text, runs


def _split(message: Message) -> tuple[str, str]:
    """Thoughts and words, without the white space around them."""
    content = message["content"]
    if "</think>" in content:
        thought, content = content.split("</think>")
        return thought.replace("<think>", "").strip(), content.strip()
    return message.get("reasoning_content", "").strip(), content.strip()


def _calls(message: Message) -> list[tuple[str, dict[str, Any]]]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return [(call["name"], call["arguments"]) for call in calls]


def _last_question(messages: Sequence[Message]) -> int:
    return max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)


def _role(messages: Sequence[Message], i: int) -> str:
    return messages[i]["role"] if 0 <= i < len(messages) else ""


def phi4(messages: Sequence[Message], tools: bool, prompt: bool) -> Parts:
    parts: Parts = []
    for m in messages:
        is_said = m["role"] == "assistant"
        parts += [(f"<|im_start|>{m['role']}<|im_sep|>", False)]
        parts += [(m["content"] + "<|im_end|>", is_said)]
    return [*parts, ("<|im_start|>assistant<|im_sep|>" if prompt else "", False)]


def r1(messages: Sequence[Message], tools: bool, prompt: bool) -> Parts:
    parts: Parts = [("<｜begin▁of▁sentence｜>", False)]
    for i, m in enumerate(messages):
        thought, words = _split(m)
        if m["role"] == "assistant":
            parts.append(("<｜Assistant｜>", False))
            if i > _last_question(messages):
                parts += [("<think>\n", False), (f"{thought}\n</think>\n\n", True)]
            parts.append((f"{words}<｜end▁of▁sentence｜>", True))
        else:
            parts.append((("<｜User｜>" if m["role"] == "user" else "") + words, False))
    return [*parts, ("<｜Assistant｜><think>\n" if prompt else "", False)]


# --------------------------------------------------------------- results in the user's name


def _response(messages: Sequence[Message], i: int, start: str, end: str) -> str:
    """One of the results that stand together in a turn of the user."""
    text = f"\n<tool_response>\n{messages[i]['content']}\n</tool_response>"
    before = "" if _role(messages, i - 1) == "tool" else start
    return before + text + ("" if _role(messages, i + 1) == "tool" else end)


def granite(messages: Sequence[Message], tools: bool, prompt: bool) -> Parts:
    start, end = "<|start_of_role|>{}<|end_of_role|>", "<|end_of_text|>"
    parts: Parts = []
    if tools:
        system = [m["content"] for m in messages[:1] if m["role"] == "system"]
        text = "\n\n".join([*system, described["GRANITE_TOOLS"]])
        parts.append((start.format("system") + text + end + "\n", False))
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            calls = [
                f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(given)}}}\n</tool_call>'
                for name, given in _calls(m)
            ]
            said = "\n".join([m["content"], *calls] if m["content"] else calls)
            parts += [(start.format("assistant"), False), (said + end, True), ("\n", False)]
        elif m["role"] == "tool":
            parts.append((_response(messages, i, start.format("user"), end + "\n"), False))
        elif m["role"] != "system" or not tools:
            parts.append((start.format(m["role"]) + m["content"] + end + "\n", False))
    return [*parts, (start.format("assistant") if prompt else "", False)]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def qwen35(
    messages: Sequence[Message], tools: bool, prompt: bool, enable_thinking: bool = True
) -> Parts:
    parts: Parts = []
    system = [m["content"].strip() for m in messages[:1] if m["role"] == "system"]
    if tools or system:
        text = "\n\n".join([described["QWEN_TOOLS"], *system] if tools else system)
        parts.append((f"<|im_start|>system\n{text}<|im_end|>\n", False))
    for i, m in enumerate(messages):
        thought, words = _split(m)
        if m["role"] == "user":
            parts.append((f"<|im_start|>user\n{words}<|im_end|>\n", False))
        elif m["role"] == "tool":
            parts.append((_response(messages, i, "<|im_start|>user", "<|im_end|>\n"), False))
        elif m["role"] == "assistant":
            parts.append(("<|im_start|>assistant\n", False))
            if i > _last_question(messages):
                is_given = not enable_thinking and not thought
                parts += [("<think>\n", False), (f"{thought}\n</think>\n\n", not is_given)]
            calls = "\n".join(
                f"<tool_call>\n<function={name}>\n"
                + "".join(f"<parameter={k}>\n{_plain(v)}\n</parameter>\n" for k, v in given.items())
                + "</function>\n</tool_call>"
                for name, given in _calls(m)
            )
            gap = "\n\n" if words and calls else ""
            parts += [(words + gap + calls + "<|im_end|>", True), ("\n", False)]
    if prompt:
        block = "<think>\n" if enable_thinking else "<think>\n\n</think>\n\n"
        parts.append((f"<|im_start|>assistant\n{block}", False))
    return parts


# ------------------------------------------------------------------ turns without an own end


def glm(
    messages: Sequence[Message], tools: bool, prompt: bool, enable_thinking: bool = True
) -> Parts:
    parts: Parts = [("[gMASK]<sop>" + (described["GLM_TOOLS"] if tools else ""), False)]
    marks = {"tool": "<|observation|>"}
    for i, m in enumerate(messages):
        thought, words = _split(m)
        before = _role(messages, i - 1)
        if not before == m["role"] == "tool":
            # What opens this message stopped the model, if it was speaking.
            stops = before == "assistant" and m["role"] in ("user", "tool")
            parts.append((marks.get(m["role"], f"<|{m['role']}|>"), stops))
        if m["role"] == "tool":
            parts.append((f"\n<tool_response>\n{m['content']}\n</tool_response>", False))
        elif m["role"] == "assistant":
            thought = thought if i > _last_question(messages) else ""
            parts.append((f"\n<think>{thought}</think>", enable_thinking or bool(thought)))
            parts.append((f"\n{words}" if words else "", True))
            for name, given in _calls(m):
                pairs = "".join(
                    f"<arg_key>{k}</arg_key>\n<arg_value>{_plain(v)}</arg_value>\n"
                    for k, v in given.items()
                )
                parts.append((f"\n<tool_call>{name}\n{pairs}</tool_call>", True))
        else:
            is_off = m["role"] == "user" and not enable_thinking
            parts.append((f"\n{m['content']}" + ("/nothink" if is_off else ""), False))
    if prompt:
        parts.append(("<|assistant|>" + ("" if enable_thinking else "\n<think></think>"), False))
    elif _role(messages, len(messages) - 1) == "assistant":
        parts.append(("<|observation|>" if _calls(messages[-1]) else "<|user|>", True))
    return parts


def _gemma(value: Any) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        pairs = sorted(value.items(), key=lambda pair: pair[0].lower())
        return "{" + ",".join(f"{k}:{_gemma(v)}" for k, v in pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_gemma, value)) + "]"
    return json.dumps(value)


def gemma4(
    messages: Sequence[Message], tools: bool, prompt: bool, enable_thinking: bool = False
) -> Parts:
    system = [m["content"].strip() for m in messages[:1] if m["role"] == "system"]
    parts: Parts = [("<bos>", False)]
    if system or tools or enable_thinking:
        think, tool = (
            ("<|think|>\n" if enable_thinking else ""),
            (described["GEMMA_TOOL"] if tools else ""),
        )
        parts.append((f"<|turn>system\n{think}{''.join(system)}{tool}<turn|>\n", False))
    names: dict[str, str] = {}
    for i, m in enumerate(messages):
        thought, words = _split(m)
        before, behind = _role(messages, i - 1), _role(messages, i + 1)
        if m["role"] == "user":
            parts.append((f"<|turn>user\n{words}<turn|>\n", False))
        elif m["role"] == "tool":
            opens = "<|tool_response>" if before == "tool" else ""  # else the call wrote it
            said = f"response:{names[m['tool_call_id']]}{{value:{_gemma(words)}}}<tool_response|>"
            parts.append((opens + said + ("<turn|>\n" if behind == "user" else ""), False))
        elif m["role"] == "assistant":
            parts.append(("" if before == "tool" else "<|turn>model\n", False))
            if thought and i > _last_question(messages):
                parts.append((f"<|channel>thought\n{thought}\n<channel|>", True))
            parts.append((words, True))
            for name, given in _calls(m):
                parts.append((f"<|tool_call>call:{name}{_gemma(given)}<tool_call|>", True))
            parts.append(("<|tool_response>" if _calls(m) else "<turn|>", True))
            parts.append(("" if _calls(m) else "\n", False))
            names |= {c["id"]: c["function"]["name"] for c in m.get("tool_calls", ())}
    continues = _role(messages, len(messages) - 1) == "tool"
    return [*parts, ("<|turn>model\n" if prompt and not continues else "", False)]


# ------------------------------------------------------------------------- several closers


def cohere(messages: Sequence[Message], tools: bool, prompt: bool) -> Parts:
    start, end = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
    system = [m["content"] for m in messages[:1] if m["role"] == "system"]
    parts: Parts = [("<BOS_TOKEN>", False)]
    if system or tools:
        text = "\n\n".join([*system, described["COHERE_TOOLS"]] if tools else system)
        parts.append((f"{start}<|SYSTEM_TOKEN|>{text}{end}", False))
    ids: list[str] = []
    for i, m in enumerate(messages):
        thought, words = _split(m)
        if m["role"] == "user":
            parts.append((f"{start}<|USER_TOKEN|>{m['content']}{end}", False))
        elif m["role"] == "tool":
            number = ids.index(m["tool_call_id"])
            result = (
                f'    {{\n        "tool_call_id": "{number}",\n        "results": {{\n            '
                f'"0": {json.dumps(m["content"])}\n        }},\n        "is_error": null\n    }}'
            )
            opens = f"{start}<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[\n"
            parts.append(("" if _role(messages, i - 1) == "tool" else opens, False))
            goes_on = _role(messages, i + 1) == "tool"
            parts.append((result + (",\n" if goes_on else f"\n]<|END_TOOL_RESULT|>{end}"), False))
        elif m["role"] == "assistant":
            parts.append((f"{start}<|CHATBOT_TOKEN|>", False))
            parts.append((f"<|START_THINKING|>{thought}<|END_THINKING|>" if thought else "", True))
            calls = ",\n".join(
                f'    {{"tool_call_id": "{len(ids) + k}", "tool_name": "{name}", '
                f'"parameters": {json.dumps(given)}}}'
                for k, (name, given) in enumerate(_calls(m))
            )
            action = f"<|START_ACTION|>[\n{calls}\n]<|END_ACTION|>"
            parts.append((action if calls else f"<|START_RESPONSE|>{words}<|END_RESPONSE|>", True))
            parts.append((end, True))
            ids += [call["id"] for call in m.get("tool_calls", ())]
    return [*parts, (f"{start}<|CHATBOT_TOKEN|>" if prompt else "", False)]


def harmony(
    messages: Sequence[Message],
    tools: bool,
    prompt: bool,
    reasoning_effort: str = "medium",
    current_date: str = "",
) -> Parts:
    def message(header: str, text: str, end: str = "<|end|>") -> str:
        return f"<|start|>{header}<|message|>{text}{end}"

    date = f"Current date: {current_date}\n" if current_date else ""
    system = (
        f"You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
        f"{date}\nReasoning: {reasoning_effort}\n\n# Valid channels: analysis, commentary, final. "
        "Channel must be included for every message."
    )
    if tools:
        system += "\nCalls to these tools must go to the commentary channel: 'functions'."
    instructions = [
        "# Instructions\n\n" + m["content"] for m in messages[:1] if m["role"] == "system"
    ]
    sections = [*instructions, described["HARMONY_TOOL"]] if tools else instructions
    text = message("system", system)
    text += message("developer", "\n\n".join(sections)) if sections else ""
    parts: Parts = [(text, False)]
    finals = [i for i, m in enumerate(messages) if m["role"] == "assistant" and not _calls(m)]
    past = [i for i in finals if prompt or i < len(messages) - 1]  # answers that something follows
    for i, m in enumerate(messages):
        thought, words = _split(m)
        if m["role"] == "assistant":
            said = []
            if thought and not [j for j in past if j >= i]:
                said.append(message("assistant<|channel|>analysis", thought))
            for name, given in _calls(m):
                if words:
                    said.append(message("assistant<|channel|>commentary", words))
                header = f"assistant<|channel|>commentary to=functions.{name} <|constrain|>json"
                said.append(message(header, json.dumps(given), "<|call|>"))
            if not _calls(m):
                end = "<|end|>" if i in past else "<|return|>"
                said.append(message("assistant<|channel|>final", words, end))
            start = "<|start|>assistant"
            parts += [(start, False), ("".join(said).removeprefix(start), True)]
        elif m["role"] == "tool":
            name = _calls(messages[i - 1])[0][0]
            header = f"functions.{name} to=assistant<|channel|>commentary"
            parts.append((message(header, m["content"]), False))
        elif m["role"] == "user":
            parts.append((message("user", m["content"]), False))
    return [*parts, ("<|start|>assistant" if prompt else "", False)]


WRITERS: dict[str, Writer] = {
    "phi4": phi4,
    "r1": r1,
    "granite": granite,
    "qwen3.5": qwen35,
    "glm": glm,
    "gemma4": gemma4,
    "cohere": cohere,
    "gpt-oss": harmony,
}
