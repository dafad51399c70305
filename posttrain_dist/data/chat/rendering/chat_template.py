"""A chat template, and a conversation as the text that it writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import jinja2

from posttrain_dist.data import CLOCK
from posttrain_dist.data.chat.controls import ControlTokens, Span
from posttrain_dist.data.chat.rendering.causal import TracedMessages, is_causal
from posttrain_dist.data.chat.rendering.jinja_environment import (
    THOUGHTS,
    OutputBuffer,
    compile_template,
    fixed_clock,
    line_of,
    with_thoughts,
)
from posttrain_dist.data.chat.rendering.template_probes import TemplateProbes
from posttrain_dist.errors import DataError, ModelError
from posttrain_dist.flow import Message

WITH_TOOLS = (
    "choose a template that knows tools, whose tokens this tokenizer has: that of the model's "
    "family, else template=chatml, llama3, mistral, qwen, qwen3.5, glm, granite, cohere, gemma4 or "
    "gpt-oss; or leave them out of the row"
)
_MARK = re.compile(r"\{%-?\+?\s*generation\s*-?\+?%\}")
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


class ChatTemplate:
    """A chat template with the special tokens of a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        source: Jinja; null: the tokenizer's own.
        variables: name -> value that the template may read, beside the messages and tools.
        ends: tokens at which generation stops, by the model's generation config.
        end_of_turn: the token that ends a turn where the template writes none.
        controls: of a template with other variables; null: they are found.
        place: where the template stands, for errors.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: str | None = None,
        variables: Mapping[str, Any] | None = None,
        ends: Sequence[str] = (),
        end_of_turn: str | None = None,
        controls: ControlTokens | None = None,
        place: str = "chat template",
    ) -> None:
        self.source: str = tokenizer.get_chat_template() if source is None else source
        self.variables = dict(variables or {})
        self.marks_assistant = bool(_MARK.search(self.source))
        self.end_tokens, self.end_of_turn = tuple(ends), end_of_turn
        self.bos, self.place = str(tokenizer.bos_token), place
        self._tokenizer = tokenizer
        self._given = {**tokenizer.special_tokens_map, **self.variables}
        if CLOCK in self.variables:
            self._given[CLOCK] = fixed_clock(self.variables[CLOCK])
        stops = "".join([*self.end_tokens, end_of_turn or ""])
        self.controls = controls or ControlTokens(tokenizer, self._skeleton() + stops)

    def with_variables(self, variables: Mapping[str, Any]) -> ChatTemplate:
        """The same template with more variables; they go before its own."""
        merged = {**self.variables, **variables}
        return ChatTemplate(
            self._tokenizer,
            self.source,
            merged,
            self.end_tokens,
            self.end_of_turn,
            self.controls,
            self.place,
        )

    @cached_property
    def probes(self) -> TemplateProbes:
        """What the template shows of itself."""
        return TemplateProbes(self)

    @property
    def environment(self) -> jinja2.Environment:
        """In which it is compiled.

        Raises:
            jinja2.TemplateSyntaxError: it is not valid.
        """
        return self._compiled.environment

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
        last: see data/causal.py.
        """
        messages = self.as_given(messages, where)
        return self._render(messages, where, tools, generation_prompt, marks, starts)

    def as_given(self, messages: Sequence[Message], where: str) -> Sequence[Message]:
        """Messages as the template takes them: arguments of tool calls, and names of thoughts.

        Arguments are an object, or JSON text if only that comes out as JSON.

        Raises:
            DataError: they come out neither way.
        """
        if not all(map(_THOUGHTS.isdisjoint, messages)):
            messages = with_thoughts(messages)
        if not all(map(_CALLS.isdisjoint, messages)) and self._arguments_as_text(where):
            return [_with_text(message) for message in messages]
        return messages

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
        try:
            compiled: Any = self._compiled
            output, spans = OutputBuffer(), list[Span]()
            given = list(messages) if starts is None else TracedMessages(messages, output, starts)
            recording = compiled.environment.record_marks(output, spans) if marks else _NOTHING
            variables = {
                **self._given,
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
                f"is not valid Jinja: {error}",
                where=f"{self.place}, line {error.lineno}",
                fix="correct the template, or choose another (template=<one of docs/templates.md>)",
            ) from error
        except _REFUSALS as error:
            raise self._refusal(error, messages, tools, where) from error

    def _refusal(
        self, error: Exception, messages: Sequence[Message], tools: Sequence[Any], where: str
    ) -> DataError:
        """What a template refuses by raise_exception, or what it cannot do with a row."""
        calls = tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)
        if type(error) is jinja2.TemplateError:
            fix = "change the order or roles of the messages, or the template"
            what = f"the chat template refuses this conversation: {error}"
        else:
            line = line_of(error, self._compiled)
            at = f" in line {line}" if line else ""
            what = f"the chat template fails{at} on this conversation: {error}"
            fix = f"correct the template ({self.place}), or choose another"
        return DataError(what, where=where, fix=WITH_TOOLS if calls else fix)

    @cached_property
    def additions(self) -> tuple[str, str] | None:
        """What follows the last message: with and without a generation prompt.

        Null where that depends on the messages, or earlier ones on later ones.
        """
        if not is_causal(self.source, self.environment):
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
