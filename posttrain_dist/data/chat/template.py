"""Chat templates: which there are, and a conversation as the text that one writes."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from posttrain_dist.data import Template
from posttrain_dist.data.chat.causal import TracedMessages, is_causal
from posttrain_dist.data.chat.controls import ControlTokens, Span
from posttrain_dist.data.chat.jinja_environment import (
    THOUGHTS,
    OutputBuffer,
    compile_template,
    with_thoughts,
)
from posttrain_dist.data.prefix import common_prefix_length
from posttrain_dist.errors import ConfigError, DataError, ModelError
from posttrain_dist.flow import Message

FOLDER = Path(__file__).parent / "templates"
WITH_TOOLS = (
    "choose a template that knows tools, that of the model's family: template=chatml, llama3, "
    "mistral or qwen; or leave them out of the row"
)
_MARK = re.compile(r"\{%-?\+?\s*generation\s*-?\+?%\}")
_NEEDS = re.compile(r"\{#-?\s*tokens:(.*?)-?#\}", re.DOTALL)
# Content in the conversation that shows a template's skeleton; roles that it refuses are left out.
_PROBES = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",))
_THOUGHTS = frozenset(THOUGHTS)
_CALLS = frozenset({"tool_calls"})
_NOTHING: nullcontext[None] = nullcontext()
# What Jinja raises when a template does what it cannot do with a row.
_REFUSALS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    RecursionError,
)
_ARGUMENTS = {"probe_key": "probe value"}
_ANSWER = {"role": "assistant", "content": "a"}
# A question and an answer, and how the conversation goes on.
_ASK, _SAY = {"role": "user", "content": "probe q"}, {"role": "assistant", "content": "probe a"}
_TURNS = ([_ASK, _SAY], [{"role": "system", "content": "probe s"}, _ASK, _SAY])


# ------------------------------------------------------------------------------------ choosing


def template_names() -> list[str]:
    """The names of the templates that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def load_template(
    choice: Template, tokenizer: Any, model_folder: Path | None = None
) -> ChatTemplate:
    """The template that `choice.name` means: "tokenizer", a shipped one, or a .jinja file.

    Raises:
        ConfigError: there is no such template, or it needs tokens that the tokenizer lacks.
        ModelError: the template is broken, or the tokenizer was to have one and has none.
    """
    name = choice.name
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template",
                where=str(model_folder or "tokenizer"),
                fix=_template_advice(tokenizer),
            )
        return ChatTemplate(tokenizer)
    if name.endswith(".jinja"):
        path = Path(name).expanduser()
    else:
        path = FOLDER / f"{name}.jinja"
        if name not in template_names():
            names = ["tokenizer", *template_names()]
            near = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"there is no template {name!r}" + (f", did you mean {near[0]!r}?" if near else ""),
                where="template.name",
                fix=f"use one of {', '.join(names)}, or the path of a .jinja file",
            )
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the template file {path} cannot be read: {error}",
            where="template.name",
            fix="give the path of a .jinja file",
        ) from error
    _refuse_missing_tokens(name, source, tokenizer, model_folder)
    return ChatTemplate(tokenizer, source)


def _template_advice(tokenizer: Any) -> str:
    """Which of the shipped templates a tokenizer without one has the tokens for."""
    sources = {name: (FOLDER / f"{name}.jinja").read_text("utf-8") for name in template_names()}
    fit = [name for name, source in sources.items() if not _missing_tokens(source, tokenizer)]
    first = f"set template={fit[0]}" if fit else "set template.name=<a .jinja file>"
    others = f" (or {', '.join(fit[1:])}: this tokenizer has their tokens)" if fit[1:] else ""
    return (
        f"{first}{others}, best the one of the model's instruct sibling; rows of prompt and "
        "completion as text need none"
    )


def _missing_tokens(source: str, tokenizer: Any) -> list[str]:
    """The special tokens that a template is written with and a tokenizer lacks."""
    declared = _NEEDS.search(source)
    needed = declared[1].split() if declared else []
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    variables = {n for n in needed if n in ("bos_token", "eos_token")}
    missing = [n for n in needed if n not in variables and n not in added]
    return missing + [n for n in sorted(variables) if not tokenizer.special_tokens_map.get(n)]


def _refuse_missing_tokens(
    name: str, source: str, tokenizer: Any, model_folder: Path | None
) -> None:
    missing = _missing_tokens(source, tokenizer)
    if missing:
        raise ConfigError(
            f"template {name!r} is written with {', '.join(missing)}, which the tokenizer of "
            f"{model_folder or 'this model'} does not have: they would be split into pieces of "
            "text",
            where="template.name",
            fix="choose the template of the model's own family (template=tokenizer where the "
            "model brings one), or add the tokens to the tokenizer and the embeddings",
        )


# ----------------------------------------------------------------------------------- rendering


class ChatTemplate:
    """A chat template with the special tokens of a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        source: Jinja; null: the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, source: str | None = None) -> None:
        self.source: str = tokenizer.get_chat_template() if source is None else source
        self.sha256 = hashlib.sha256(self.source.encode()).hexdigest()
        self.marks_assistant = bool(_MARK.search(self.source))
        self._variables = dict(tokenizer.special_tokens_map)
        self.controls = ControlTokens(tokenizer, self._skeleton())

    def render(
        self,
        messages: Sequence[Message],
        where: str,
        *,
        tools: Sequence[Any] = (),
        generation_prompt: bool = False,
    ) -> str:
        """Text of a conversation.

        Raises:
            DataError: the template refuses this conversation.
            ModelError: the template itself is broken.
        """
        return self.render_marked(messages, where, tools, generation_prompt, marks=False)[0]

    def render_marked(
        self,
        messages: Sequence[Message],
        where: str,
        tools: Sequence[Any],
        generation_prompt: bool,
        marks: bool,
        starts: dict[int, int] | None = None,
    ) -> tuple[str, list[Span]]:
        """Text, and with `marks` what stands between the template's `{% generation %}` marks.

        `starts`, where given, is filled with the place of each message, and of the end of the
        last: see data/causal.py. Arguments of tool calls are given to the template as an object,
        or as JSON text if only that comes out as JSON.
        """
        if not all(map(_CALLS.isdisjoint, messages)) and self._arguments_as_text(where):
            messages = [_with_text(message) for message in messages]
        return self._render(messages, where, tools, generation_prompt, marks, starts)

    def _render(
        self,
        messages: Sequence[Message],
        where: str,
        tools: Sequence[Any] = (),
        generation_prompt: bool = False,
        marks: bool = False,
        starts: dict[int, int] | None = None,
    ) -> tuple[str, list[Span]]:
        # Not apply_chat_template: it gives no character spans, and its token mask loses the last
        # bytes of a character that is several tokens.
        if not all(map(_THOUGHTS.isdisjoint, messages)):
            messages = with_thoughts(messages)
        try:
            compiled: Any = self._compiled
            output, spans = OutputBuffer(), list[Span]()
            given = list(messages) if starts is None else TracedMessages(messages, output, starts)
            recording = compiled.environment.record_marks(output, spans) if marks else _NOTHING
            variables = {
                **self._variables,
                "messages": given,
                "tools": list(tools) or None,
                "documents": None,
                "add_generation_prompt": generation_prompt,
            }
            with recording:
                # As `generate` does, which also makes tracebacks of the template's own lines.
                for piece in compiled.root_render_func(compiled.new_context(variables)):
                    output.append(piece)
            return "".join(output), spans
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"is not valid Jinja: {error}", where="chat template", fix="correct the template"
            ) from error
        except _REFUSALS as error:
            calls = tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
            raise DataError(
                f"the chat template refuses this conversation: {error}",
                where=where,
                fix=WITH_TOOLS
                if calls
                else "change the order or roles of the messages, or the template",
            ) from error

    @cached_property
    def additions(self) -> tuple[str, str] | None:
        """What follows the last message: with and without a generation prompt.

        Null where that depends on the messages, or earlier ones on later ones.
        """
        if not is_causal(self.source, self._compiled.environment):
            return None
        found = []
        for generation_prompt in (True, False):
            starts: dict[int, int] = {}
            messages = [{"role": "user", "content": "a"}]
            try:
                text, _ = self.render_marked(messages, "", (), generation_prompt, False, starts)
            except DataError:
                return None
            if 1 not in starts:
                return None
            found.append(text[starts[1] :])
        return found[0], found[1]

    @cached_property
    def trailer(self) -> str:
        """What stands behind the end of the last turn, and behind that of no inner one.

        Empty where the template refuses the probe, or where an inner turn has no end of its own.
        """
        for turns in _TURNS:
            try:
                last, inner = self._render(turns, "")[0], self._render([*turns, _ASK], "")[0]
            except DataError:
                continue
            shared = common_prefix_length(last, inner)
            content_end = last.rfind(_SAY["content"]) + len(_SAY["content"])
            # Two different tokens may begin alike.
            tokens = [m.span() for m in self.controls.closing.finditer(last, content_end)]
            shared = next((a for a, b in tokens if a < shared < b), shared)
            is_closed = any(b <= shared for _, b in tokens)
            return last[shared:] if content_end <= shared and is_closed else ""
        return ""

    def _arguments_as_text(self, where: str) -> bool:
        """Whether the template is given the arguments of tool calls as JSON text.

        Raises:
            DataError: they come out neither way.
        """
        if self._arguments is None:
            raise DataError(
                "the chat template writes the arguments of tool calls as Python does, not as JSON",
                where=where,
                fix="write tool_call.function.arguments | tojson in the template, or leave out "
                "the rows that call tools",
            )
        return self._arguments == "text"

    @cached_property
    def _arguments(self) -> str | None:
        """What calls are given to the template with: "object" or "text"; null: neither works."""
        as_object, as_text = self._probe_call(_ARGUMENTS), self._probe_call(json.dumps(_ARGUMENTS))
        is_python = as_object is not None and repr(_ARGUMENTS) in as_object
        if as_object is not None and not is_python:
            return "object"
        if as_text is not None and (json.dumps(_ARGUMENTS) in as_text or not is_python):
            return "text"
        return None if is_python else "object"

    def _probe_call(self, arguments: Any) -> str | None:
        """A conversation with a call; null where the template refuses it."""
        function = {"name": "probe", "arguments": arguments}
        call = {"type": "function", "id": "a23456789", "function": function}
        ask = {"role": "user", "content": "a"}
        answer: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": "a", "tool_call_id": call["id"], "name": "probe"}
        for messages in ([ask, answer], [ask, answer, result], [ask, answer, result, _ANSWER]):
            try:
                return self._render(messages, "probe")[0]
            except DataError:
                continue
        return None

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return compile_template(self.source)

    def _skeleton(self) -> str:
        for roles in _PROBES:
            messages = [{"role": role, "content": "a"} for role in roles]
            try:
                return self.render(messages, "probe", generation_prompt=True)
            except DataError:
                continue
        return ""


def _with_text(message: Message) -> Message:
    """The message with the arguments of its tool calls as JSON text."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_call_with_text(c) for c in calls]} if calls else message


def _call_with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function.get("arguments"), dict | list):
        return call
    text = json.dumps(function["arguments"], ensure_ascii=False)
    written = {**function, "arguments": text}
    return {**call, "function": written} if "function" in call else written
