"""A tokenizer's chat template: render a conversation, and find what the assistant says in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2

from posttrain_dist.errors import DataError, ModelError

Message = dict[str, str]
Span = tuple[int, int]  # characters [start, end) of the rendered text

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ADD_MARKS = (
    "wrap what the assistant says, with its end-of-turn token, in {% generation %} ... "
    "{% endgeneration %} in the chat template"
)


class ChatTemplate:
    """The chat template of a tokenizer, with its special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.source: str = tokenizer.get_chat_template()
        self.marks_assistant = bool(_MARK.search(self.source))
        self._variables = dict(tokenizer.special_tokens_map)
        specials = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        specials |= set(tokenizer.all_special_tokens)
        longest_first = sorted(specials, key=lambda token: (-len(token), token))
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(
        self, messages: Sequence[Message], where: str, generation_prompt: bool = False
    ) -> str:
        """Text of a conversation.

        Raises:
            DataError: the template refuses this conversation.
            ModelError: the template itself is broken.
        """
        return self._render(messages, where, generation_prompt=generation_prompt)[0]

    def spans(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        """Text, and what is supervised of it: each assistant turn with its end-of-turn token."""
        if self.marks_assistant:
            return self.marked_spans(messages, where)
        return self.prefix_spans(messages, where)

    def marked_spans(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        """By the template's own `{% generation %}` marks.

        Marks around the content alone are widened by the end-of-turn token behind it. Which
        special token that is shows where the conversation ends with this turn: behind an inner
        turn stands what opens the next one.
        """
        text, spans = self._render(messages, where, marks=True)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if len(spans) != len(turns):  # the template marks a choice of turns: take it as it is
            return text, [span for span in spans if span[0] < span[1]]
        widened = []
        for turn, (start, end) in zip(turns, spans, strict=True):
            if not self._ends_with_special(text[start:end]) and self._special.match(text, end):
                end = self._widen(messages[: turn + 1], text, end, where)
            widened.append((start, end))
        return text, [span for span in widened if span[0] < span[1]]

    def prefix_spans(self, messages: Sequence[Message], where: str) -> tuple[str, list[Span]]:
        """By rendering every prefix: a turn is what it adds behind the generation prompt.

        Raises:
            ModelError: the prefixes do not nest, so no such span can be proved right.
        """
        text = self.render(messages, where)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:i], where, generation_prompt=True)
            upto = self.render(messages[: i + 1], where)
            if not (upto.startswith(prompt) and text.startswith(upto)):
                raise ModelError(
                    f"{where}: the chat template renders earlier turns differently once later "
                    f"ones follow (seen at messages[{i}]), so what the assistant says cannot be "
                    "told from the rest",
                    where="chat template",
                    fix=_ADD_MARKS,
                )
            spans.append((len(prompt), len(prompt) + self._turn_end(upto[len(prompt) :], message)))
        return text, [span for span in spans if span[0] < span[1]]

    # ------------------------------------------------------------------------------- inside

    def _turn_end(self, added: str, message: Message) -> int:
        """End of the turn in the text that it added: behind the special token that closes it."""
        content = message["content"].strip()
        at = added.find(content)
        found = self._special.search(added, at + len(content) if at >= 0 else 0)
        # A template without an end token: its separator is all that tells the end of the turn.
        return found.end() if found else len(added)

    def _ends_with_special(self, text: str) -> bool:
        ends = [found.end() for found in self._special.finditer(text)]
        return bool(ends) and ends[-1] == len(text.rstrip())

    def _widen(self, messages: Sequence[Message], text: str, end: int, where: str) -> int:
        alone, spans = self._render(messages, where, marks=True)
        token = self._special.match(alone, spans[-1][1]) if spans else None
        if token and text.startswith(token.group(), end):
            return end + len(token.group())
        return end

    def _render(
        self,
        messages: Sequence[Message],
        where: str,
        generation_prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        # Not apply_chat_template: it gives no character spans, and its token mask loses the last
        # bytes of a character that is several tokens.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"is not valid Jinja: {error}", where="chat template", fix="mend the template"
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(
                f"the chat template refuses this conversation: {error}",
                where=where,
                fix="change the order or roles of the messages, or the template",
            ) from error
        return texts[0], [(int(a), int(b)) for a, b in spans[0]] if marks else []
