"""Control tokens: the ones that the template writes, kept apart from their likes in the content.

A conversation that quotes `<|im_end|>` must not end its turn there. Such a token is broken up by a
character that occurs nowhere else before the template sees it, and is put together again after.
What is then still a control token in the rendered text was written by the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain_dist.errors import DataError
from posttrain_dist.flow import Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Span = tuple[int, int]  # characters [start, end) of a text

_MARKUP = re.compile(r"<\S+>|\[\S+\]")
REASONING = re.compile(r"</?think(?:ing)?>")  # what an assistant writes itself
_PRIVATE = range(0xE000, 0xF900)  # characters without a meaning of their own
_ALIASES = 0xF0000  # first of the private characters that stand for control tokens
_OUTPUT = ("content", "reasoning_content")  # of an assistant: its own words
# Keys that the templates look up; all others are content.
_STRUCTURE = frozenset(
    {
        *("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "type", "id"),
        *("name", "function", "arguments", "description", "parameters"),
    }
)


class EscapedText(NamedTuple):
    """A rendered text whose content may hold what looks like control tokens."""

    text: str  # as it is tokenised
    aliased: str | None  # same length, the template's own control tokens under other names
    breaks: tuple[int, ...]  # places in the broken text that are gone from `text`
    forged: tuple[Span, ...]  # what only looks like control tokens

    def place(self, at: int) -> int:
        """Where character `at` of the broken text stands in `text`."""
        return at - sum(1 for there in self.breaks if there < at)


class ControlTokens:
    """The tokens of one tokenizer that structure a conversation.

    Args:
        tokenizer: a fast tokenizer of transformers.
        skeleton: conversation without content as the template renders it: added tokens in it are
            control tokens also where the tokenizer does not call them special.
    """

    def __init__(self, tokenizer: Any, skeleton: str = "") -> None:
        added = {str(t.content): (i, t) for i, t in tokenizer.added_tokens_decoder.items()}
        names = {name for name, (_, token) in added.items() if token.special}
        names |= set(tokenizer.all_special_tokens)
        names |= {
            name
            for name in added
            if name in skeleton and _MARKUP.fullmatch(name) and not REASONING.fullmatch(name)
        }
        self.ids: dict[str, int] = {
            name: tokenizer.convert_tokens_to_ids(name) for name in sorted(names) if name
        }
        self.names = tuple(self.ids)
        # The unknown token stands for any text, so it is no border.
        self.numbers = frozenset(self.ids.values()) - {tokenizer.unk_token_id}
        flags = {name: added[name][1] for name in self.ids if name in added}
        # Where normalisation comes first, the borders of such a token prove nothing.
        self.are_borders = not any(token.normalized for token in flags.values())
        self.strip_ids = frozenset(
            self.ids[name] for name, token in flags.items() if token.lstrip or token.rstrip
        )
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._twin: tuple[Tokenizer, dict[int, int]] | None = None
        self._aliases = {n: chr(_ALIASES + i) * len(n) for i, n in enumerate(self.ids)}
        self.pattern = re.compile(_any(self.ids))
        # Thoughts are part of a turn, so their tokens never close one.
        self.closers = tuple(n for n in self.ids if not REASONING.fullmatch(n))
        self.closing = re.compile(_any(self.closers))
        self.eos = str(tokenizer.eos_token)
        self._risky, self._risky_output = _Risky(self.ids), _Risky(self.closers)

    # -------------------------------------------------------------------------- before rendering

    def escape(
        self, messages: Sequence[Message], tools: Sequence[Any]
    ) -> tuple[list[Message], list[Any], str]:
        """Messages and tools with control tokens in them broken up, and the character used.

        The character is empty where there was nothing to do.
        """
        if not any(map(self._risky.is_in, _strings([messages, tools]))):
            return list(messages), list(tools), ""
        used = set().union(*(set(s) for s in _strings([messages, tools])))
        breaker = next(chr(code) for code in _PRIVATE if chr(code) not in used)
        broken = [self._break_message(message, breaker) for message in messages]
        return broken, [self._break(tool, breaker) for tool in tools], breaker

    def _break_message(self, message: Message, breaker: str) -> Message:
        broken = {}
        for key, value in message.items():
            is_output = key in _OUTPUT and message["role"] == "assistant"
            if is_output and isinstance(value, str):
                broken[key] = self._risky_output.broken(value, breaker)
            else:
                broken[key] = value if key == "role" else self._break(value, breaker)
        return broken

    def _break(self, value: Any, breaker: str) -> Any:
        if isinstance(value, str):
            return self._risky.broken(value, breaker)
        if isinstance(value, dict):
            return {
                key if key in _STRUCTURE else self._break(key, breaker): self._break(item, breaker)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._break(item, breaker) for item in value]
        return value

    # --------------------------------------------------------------------------- after rendering

    def restore(self, broken: str, breaker: str, where: str) -> EscapedText:
        """The rendered text put together again.

        Raises:
            DataError: the text cannot be escaped.
        """
        if not breaker:
            return EscapedText(broken, None, (), ())
        if f"\\u{ord(breaker):04x}" in broken.lower():
            raise DataError(
                "the row quotes a control token where the chat template escapes all that is not "
                "ASCII, so the two cannot be distinguished",
                where=where,
                fix="leave the row out, or do not let the template's tojson escape",
            )
        text = broken.replace(breaker, "")
        breaks = tuple(i for i, char in enumerate(broken) if char == breaker)
        escaped = EscapedText(text, None, breaks, ())
        written = (m.span() for m in self.pattern.finditer(broken))
        own = {(escaped.place(start), escaped.place(end)) for start, end in written}
        found = [m.span() for m in self.pattern.finditer(text)]
        forged = tuple(span for span in found if span not in own)
        if not forged:
            return escaped
        if any(_ALIASES <= ord(char) < _ALIASES + len(self.ids) for char in text):
            raise DataError(
                "the row quotes a control token and also holds private characters, so they "
                "cannot be distinguished",
                where=where,
                fix="remove the characters from U+F0000 on",
            )
        aliased = self.pattern.sub(lambda m: self._aliases[m[0]], broken).replace(breaker, "")
        return EscapedText(text, aliased, breaks, forged)

    def encode_aliased(
        self, escaped: EscapedText, part: slice, where: str, anchor: str = ""
    ) -> tuple[list[int], list[Span]]:
        """Token ids and offsets where only the template's own control tokens are recognised.

        `anchor`, a control token, stands before the part; its own id is the first one then.

        The text is encoded whole, by a tokenizer that knows the template's own tokens under their
        aliases. To encode the forged spans alone, and put their ids into those of the rest, would
        change the text around them: a tokenizer that begins each piece of text with a space
        (Llama 2) would write one behind every forged token.

        Raises:
            DataError: the tokenizer makes a control token out of plain text.
        """
        assert escaped.aliased is not None
        if self._twin is None:
            self._twin = self._make_twin()
        twin, real_ids = self._twin
        text = self._aliases.get(anchor, "") + escaped.aliased[part]
        try:
            encoded = twin.encode(text, add_special_tokens=False)
        except Exception as error:  # tokenizers raise bare Exception
            raise DataError(
                f"quotes a control token, and the tokenizer cannot write it as text: {error}",
                where=where,
                fix="change the text, or leave the row out",
            ) from error
        ids = [real_ids.get(i, i) for i in encoded.ids]
        first = (part.start or 0) - len(anchor)
        for start, end in escaped.forged:
            name = escaped.text[start:end]
            for token, (a, b) in zip(ids, encoded.offsets, strict=True):
                if token == self.ids[name] and a + first < end and b + first > start:
                    raise DataError(
                        f"quotes {name}, and the tokenizer has no other way to write it",
                        where=where,
                        fix="change the text, or leave the row out",
                    )
        return ids, encoded.offsets

    def last_written(self, text: str) -> str:
        """The last control token of a text, which may have its own ones under their aliases."""
        names = {alias: name for name, alias in self._aliases.items()}
        found = [m[0] for m in re.finditer(_any({*names, *self.ids}), text)]
        if any(match in names for match in found):  # then the others are quoted
            found = [names[match] for match in found if match in names]
        return found[-1] if found else ""

    def _make_twin(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with other names for control tokens, and the ids to put back."""
        from tokenizers import Tokenizer

        real = self._backend
        described = json.loads(real.to_str())
        for token in described["added_tokens"]:
            token["content"] = self._aliases.get(token["content"], token["content"])
        model = described["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {self._aliases.get(k, k): i for k, i in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):  # Unigram: [piece, score]
            model["vocab"] = [[self._aliases.get(p[0], p[0]), *p[1:]] for p in model["vocab"]]
        if isinstance(model.get("merges"), list):
            # A tokenizer may be able to spell such a token out of its pieces: here it is text.
            model["merges"] = [m for m in model["merges"] if not self._spells_control(m)]
        if model.get("unk_token"):
            model["unk_token"] = self._aliases.get(model["unk_token"], model["unk_token"])
        twin = Tokenizer.from_str(json.dumps(described))
        twin.no_truncation()
        twin.no_padding()
        twin.encode_special_tokens = False
        names = {token.content for token in real.get_added_tokens_decoder().values()}
        moved: dict[int, int] = {}
        for name in names:
            here, there = twin.token_to_id(self._aliases.get(name, name)), real.token_to_id(name)
            if here is not None and there is not None and here != there:
                moved[here] = there
        return twin, moved

    def _spells_control(self, merge: Any) -> bool:
        """Whether a merge, "a b" or [a, b], makes a control token, or goes on from one."""
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        return bool({first, second, first + second} & self.ids.keys())


class _Risky:
    """Tokens in a text, and the half of one at either end: the template may put the rest there."""

    def __init__(self, names: Any) -> None:
        heads = {name[:i] for name in names for i in range(1, len(name))}
        tails = {name[i:] for name in names for i in range(1, len(name))}
        # Without groups: `re` then looks for the first characters of all of them at once.
        self._inside = re.compile(_any(names) + "|" + _any(heads, behind=r"(?=\s*\Z)"))
        self._at_start = re.compile(rf"\s*({_any(tails)})")

    def is_in(self, text: str) -> bool:
        return bool(self._inside.search(text) or self._at_start.match(text))

    def broken(self, text: str, breaker: str) -> str:
        text = self._inside.sub(lambda m: m[0][0] + breaker + m[0][1:], text)
        start = self._at_start.match(text)
        end = start.end() - 1 if start else 0
        return text[:end] + breaker + text[end:] if start else text


def _any(words: Any, behind: str = "") -> str:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return "|".join(re.escape(word) + behind for word in longest_first) or r"(?!)"


def _strings(value: Any) -> Iterator[str]:
    """Every string in messages or tools, keys too, but the roles and what templates look up."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if key not in _STRUCTURE:
                    yield key
                if isinstance(item, str):
                    if key != "role":
                        yield item
                else:
                    waiting.append(item)
        elif isinstance(value, list | tuple):
            waiting += value
