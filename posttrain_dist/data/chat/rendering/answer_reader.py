"""What a model generated -> its thoughts and its words, as its chat template writes both.

Special tokens say where the thoughts of some families end (Harmony's channels, Cohere's
<|END_THINKING|>), so the text is taken apart before they are left out.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from jinja2 import TemplateError

from posttrain_dist.data.chat.thoughts import CLOSING, OPENING

_ASK = {"role": "user", "content": "probe q"}
_WORDS, _THOUGHTS = "probe a", "probe t"


class Answer(NamedTuple):
    """A generated turn."""

    words: str
    thoughts: str  # empty: there are none

    @property
    def shown(self) -> str:
        """Both, for people."""
        return f"{self.thoughts}\n\n{self.words}" if self.thoughts else self.words


class AnswerReader:
    """Takes answers apart that follow the inference prompts of one chat template.

    Args:
        tokenizer: of transformers, with its chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token.content) for token in added if token.special}
        special |= set(tokenizer.all_special_tokens)
        longest_first = sorted(map(str, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        prompt = _render(tokenizer, [_ASK], add_generation_prompt=True)
        plain = _said(tokenizer, prompt, {"content": _WORDS})
        self._before_words = plain.partition(_WORDS)[0].strip() if _WORDS in plain else ""
        beside = {"reasoning_content": _THOUGHTS, "thinking": _THOUGHTS}
        full = _said(tokenizer, prompt, {"content": _WORDS, **beside})
        before, found, behind = full.partition(_THOUGHTS)
        between, also, _ = behind.partition(_WORDS)
        is_shown = bool(prompt and found and also)
        self._before_thoughts = before.strip() if is_shown else ""
        self._between = between.strip() if is_shown else ""

    def read(self, raw: str) -> Answer:
        """Thoughts and words of an answer.

        Args:
            raw: its text with special tokens, also of an answer that is not at its end.
        """
        thoughts, words = "", raw
        if self._between and self._between in raw:
            thoughts, _, words = raw.rpartition(self._between)
        elif closings := list(CLOSING.finditer(raw)):
            thoughts, words = raw[: closings[-1].start()], raw[closings[-1].end() :]
        else:
            words = self._without(raw, self._before_words)
            if words == raw:
                words = self._without(raw, self._before_thoughts)
            return Answer(self._special.sub("", words), "")
        thoughts = self._without(thoughts, self._before_thoughts).lstrip()
        if opening := OPENING.match(thoughts):
            thoughts = thoughts[opening.end() :]
        words = self._without(words, self._before_words)
        return Answer(*(self._special.sub("", part).strip() for part in (words, thoughts)))

    def _without(self, text: str, beginning: str) -> str:
        found = text.lstrip().removeprefix(beginning) if beginning else text
        return text if len(found) == len(text.lstrip()) else found


def _said(tokenizer: Any, prompt: str, turn: dict[str, str]) -> str:
    """What the template writes of a turn behind its prompt; empty where that does not begin it."""
    text = _render(tokenizer, [_ASK, {"role": "assistant", **turn}])
    return text[len(prompt) :] if prompt and text.startswith(prompt) else ""


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ValueError, TypeError, LookupError):
        return ""
