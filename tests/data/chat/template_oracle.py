"""What a row may train on, by `apply_chat_template` and the tokenizer alone.

Loaded by path: tests/ is no package. Nothing of the project is imported. For assistant message k
of a row, two public calls are made:

    prompt_k = apply_chat_template(messages[:k], add_generation_prompt=True)
    upto_k   = apply_chat_template(messages[:k + 1])

and the tokens of a prompt are tokenizer(prompt_k, add_special_tokens=False), which is what
`tokenize=True` gives. From them follows, of samples (token ids, weights):

1.  Supervised tokens come in runs, which are also cut behind an end token where a prompt ends whose
    tokens begin the sample. A run belongs to the turn of the longest such prompt that ends at or
    before it; without one it trains on what is given.
2.  Each turn of the assistant is trained in exactly one run of one sample, and that run begins
    where the tokens of its prompt end. Only an empty thinking block may stand between. Turns
    without a prompt, and those before any question, may be left out.
3.  What is said, the decoded run, holds the message's thoughts, content, and each call's name and
    arguments, one behind the other, and no word that only other messages have.
4.  Its last token is one of the shape's end tokens.
5.  Where prompt_k begins upto_k, what is said is the rest of upto_k up to its last end token, and
    that token; a rest without one is followed by one, with or without white space at its end.
    A leading empty thinking block may lack. Where the template cuts the message's thoughts out of
    that rest, they stand before it between marks of the shape. Tokens that swallow white space
    decode without it: tokens are compared where texts differ.
6.  Where prompt_k does not begin upto_k, what is said behind the thoughts is how upto_k ends, up to
    its last end token, and begins neither before both part nor with what the prompt ends in.
7.  Where the prompt leaves a thinking block open, what is said closes it before the content; where
    the prompt's header closes one, what is said opens none.
8.  A row that quotes the end token has no more control tokens than the same row without the quote:
    its prompts are compared as text, token counts as those of that row.

So a prompt's own part is never trained, but for the runs of earlier turns of the same sample.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

Sample = tuple[list[int], list[float]]  # ids and weights of one sample's tokens
_HALF_TAG = re.compile(r"[<\[][^<>\[\]]*\Z")
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_PLAIN = "unquoted"  # stands for a quoted token


class Oracle:
    """Judges the samples of one row.

    Args:
        tokenizer: with the template, as `apply_chat_template` takes it.
        messages: as the template reads them (the key of thoughts, arguments of calls).
        tools, variables: what the template reads beside them.
        ends: tokens that may end a turn.
        thinks: pairs of marks around thoughts.
    """

    def __init__(
        self,
        tokenizer: Any,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[Any],
        variables: dict[str, Any],
        ends: Sequence[str],
        thinks: Sequence[Sequence[str]],
    ) -> None:
        self._tokenizer, self._messages = tokenizer, list(messages)
        self._tools, self._variables = list(tools) or None, dict(variables)
        self._ends, self._thinks = tuple(ends), [tuple(pair) for pair in thinks]
        blocks = (re.escape(opens) + r"\s*" + re.escape(closes) for opens, closes in thinks)
        self._empty_block = re.compile(rf"\s*(?:{'|'.join(blocks)})\s*")
        whole = (f"{re.escape(opens)}.*?{re.escape(closes)}" for opens, closes in thinks)
        self._whole_block = re.compile(rf"(?:{'|'.join(whole)})\s*", re.DOTALL)
        self._turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        quoting = json.dumps(self._messages, ensure_ascii=False)
        self._quotes = [end for end in self._ends if end in quoting]

    def fault(self, samples: Sequence[Sample]) -> str:
        """What is wrong with the samples of the row, the first thing; empty: nothing."""
        trained: list[int] = []
        for number, (ids, weights) in enumerate(samples):
            prompts = dict(self._prompts_of(ids))
            ends = {self._tokenizer.convert_tokens_to_ids(end) for end in self._ends}
            cuts = [length for length in prompts.values() if ids[length - 1] in ends]
            for start, end in _runs(weights, cuts):
                owners = [turn for turn, length in prompts.items() if length <= start]
                said = self._decode(ids[start:end])
                if not owners:
                    return f"sample {number}: {said!r} is trained on before any whole prompt"
                turn = max(owners, key=prompts.__getitem__)
                if turn in trained:
                    return f"messages[{turn}] is trained in more than one run, again as {said!r}"
                trained.append(turn)
                gap = self._decode(ids[prompts[turn] : start])
                found = self._gap_fault(gap, said) or self._said_fault(turn, gap, ids[start:end])
                if found:
                    return f"messages[{turn}]: {found}"
        missing = [turn for turn in self._asked if turn not in trained]
        return f"messages{missing} are trained nowhere" if missing else ""

    # -------------------------------------------------------------------------------- rendering

    def _render(self, number: int, prompt: bool, plain: bool = False) -> str | None:
        """The first messages as text; null where the template refuses them."""
        messages = self._unquoted if plain else self._messages
        try:
            (text,) = self._tokenizer.apply_chat_template(
                [messages[:number]],  # a batch of one: no messages at all are refused otherwise
                tools=self._tools,
                add_generation_prompt=prompt,
                tokenize=False,
                **self._variables,
            )
        except Exception:
            return None  # templates raise what they like
        return str(text)

    @cached_property
    def _unquoted(self) -> list[dict[str, Any]]:
        text = json.dumps(self._messages, ensure_ascii=False)
        for end in self._quotes:
            text = text.replace(end, _PLAIN)
        return list(json.loads(text))

    def _quoted(self, text: str) -> str:
        return text.replace(_PLAIN, self._quotes[0]) if self._quotes else text

    @cached_property
    def _prompts(self) -> list[tuple[int, str, list[int]]]:
        """Turn, prompt as it is decoded, and its tokens: those of the row without quotes."""
        found = []
        for turn in self._turns:
            text = self._render(turn, prompt=True)
            plain = self._render(turn, prompt=True, plain=True) if self._quotes else text
            if text is not None and plain is not None:
                tokens = self._encode(plain)
                found.append((turn, self._quoted(self._decode(tokens)), tokens))
        return found

    def _prompts_of(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Each turn whose prompt begins the tokens, and how many of them it is."""
        for turn, text, tokens in self._prompts:
            if not self._quotes:
                if list(ids[: len(tokens)]) == tokens:
                    yield turn, len(tokens)
                continue
            for length in range(1, len(ids) + 1):
                if self._decode(ids[:length]) == text:
                    if self._controls(ids[:length]) == self._controls(tokens):
                        yield turn, length
                    break

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _controls(self, ids: Sequence[int]) -> Counter[int]:
        return Counter(i for i in ids if i in self._control_ids)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)

    @cached_property
    def _asked(self) -> list[int]:
        """Turns that have a prompt and stand behind a question."""
        roles = [message["role"] for message in self._messages]
        return [turn for turn, _, _ in self._prompts if {"user", "tool"} & set(roles[:turn])]

    # --------------------------------------------------------------------------------- one turn

    def _gap_fault(self, gap: str, said: str) -> str:
        """Text between prompt and run that is no whole empty block, with its white space."""
        block = self._empty_block.match(gap + said)
        is_block = block is not None and block.end() == len(gap)
        return "" if not gap or is_block else f"{gap!r} is neither in the prompt nor trained on"

    def _said_fault(self, turn: int, gap: str, ids: Sequence[int]) -> str:
        said, last = self._decode(ids), self._decode(ids[-1:])
        if last not in self._ends or ids[-1] not in self._control_ids:
            return f"{said!r} ends in {last!r}, which ends no turn"
        return (
            self._content_fault(turn, said)
            or self._leak_fault(turn, said)
            or self._closing_fault(turn, said)
            or self._remainder_fault(turn, gap, said, ids)
            or self._quote_fault(turn, ids)
        )

    def _content_fault(self, turn: int, said: str) -> str:
        """Thoughts, content and calls in order; white space is the template's affair."""
        dense, at = _dense(said), 0
        for part in self._parts(self._messages[turn]):
            forms = {_dense(part), _dense(json.dumps(part, ensure_ascii=False)[1:-1])}
            found = [(dense.find(form, at), len(form)) for form in forms]
            start, length = min((place for place in found if place[0] >= 0), default=(-1, 0))
            if start < 0:
                return f"{said!r} lacks {part!r}, or has it elsewhere"
            at = start + length
        return ""

    def _parts(self, message: dict[str, Any]) -> Iterator[str]:
        marks = "|".join(re.escape(mark) for pair in self._thinks for mark in pair)
        for key in ("reasoning_content", "thinking", "content"):
            pieces = re.split(marks, message.get(key) or "")
            yield from (piece.strip() for piece in pieces if piece.strip())
        for call in message.get("tool_calls", ()):
            yield call["function"]["name"]
            arguments = call["function"]["arguments"]
            given = json.loads(arguments) if isinstance(arguments, str) else arguments
            for key, value in sorted(given.items()):
                yield from (key, value if isinstance(value, str) else json.dumps(value))

    def _leak_fault(self, turn: int, said: str) -> str:
        messages = self._unquoted
        others = (m for i, m in enumerate(messages) if i != turn)
        foreign = {word for message in others for word in _words(message)} - _words(messages[turn])
        untagged = _TAG.sub(" ", said)
        leaked = sorted(word for word in foreign if re.search(rf"\b{word}\b", untagged))
        return f"{said!r} has {leaked[0]!r} of another message" if leaked else ""

    def _remainder_fault(self, turn: int, gap: str, said: str, ids: Sequence[int]) -> str:
        plain = bool(self._quotes)
        prompt = self._render(turn, prompt=True, plain=plain)
        upto = self._render(turn + 1, prompt=False, plain=plain)
        if prompt is None or upto is None:
            return ""
        if not upto.startswith(prompt):
            return self._composed_fault(turn, prompt, upto, said)
        rest = upto[len(prompt) :]
        expected = [self._quoted(text) for text in self._ended(turn, rest)]
        if gap + said in expected or self._is_swallowed(prompt, self._ended(turn, rest), ids):
            return ""
        bare = [self._empty_block.sub("", text, count=1) for text in expected]
        is_bare = all(self._empty_block.match(text) for text in expected)
        if not gap and is_bare and said in bare:
            return ""
        words = self._behind_cut_thoughts(turn, rest, gap + said)
        if words is not None and words.lstrip() in {text.lstrip() for text in bare}:
            return ""
        return f"{gap + said!r} is trained on, and inference continues with {expected[0]!r}"

    def _ended(self, turn: int, text: str) -> list[str]:
        """A text up to its last end token behind the content; else with one added."""
        content = (self._unquoted[turn].get("content") or "").strip()
        last = max((text.rfind(end) + len(end) for end in self._ends if end in text), default=0)
        if last and (content in text[:last] or content not in text):
            return [text[:last]]
        cuts = range(len(text.rstrip()), len(text) + 1)
        return [text[:cut] + end for cut in cuts for end in self._ends]

    def _composed_fault(self, turn: int, prompt: str, upto: str, said: str) -> str:
        """A turn that the template does not begin as its prompt ends."""
        words = said
        for _, closes in self._thinks:
            words = words.partition(closes)[2] if closes in words else words
        words = words.lstrip()
        same = _common_length(prompt, upto)
        half = _HALF_TAG.search(upto[:same])
        tail = upto[half.start() if half else same :]
        whole = (self._whole_block.sub("", self._quoted(text)) for text in self._ended(turn, tail))
        ends_alike = any(text.endswith(words) for text in whole)
        header = prompt[self._end_before(turn, prompt) :].strip()
        if ends_alike and not (turn and header and words.startswith(header)):
            return ""
        return f"behind its thoughts, {said!r} is not how the turn ends in {tail!r}"

    def _behind_cut_thoughts(self, turn: int, rest: str, said: str) -> str | None:
        """What follows the thoughts in what is said; null where `rest` holds them too."""
        content = (self._messages[turn].get("content") or "").strip()
        thoughts = [part for part in self._parts(self._messages[turn]) if part not in rest]
        for opens, closes in self._thinks:
            block, closed, behind = said.partition(closes)
            inside = block.strip().removeprefix(opens).strip()
            if closed and thoughts == [inside] and inside != content:
                return behind
        return None

    def _is_swallowed(self, prompt: str, ended: Sequence[str], ids: Sequence[int]) -> bool:
        """Whether these are the tokens that one of the texts has behind the prompt."""
        length = len(self._encode(prompt))
        tails = (self._encode(prompt + text)[length:] for text in ended)
        if not self._quotes:
            return list(ids) in tails
        return self._decode(ids) in (self._quoted(self._decode(tail)) for tail in tails)

    def _closing_fault(self, turn: int, said: str) -> str:
        prompt = self._render(turn, prompt=True) or ""
        for opens, closes in self._thinks:
            if not prompt.rstrip().endswith(opens):
                continue
            content = (self._messages[turn].get("content") or "").split(closes)[-1].strip()
            before = said[: said.rfind(content)] if content else said
            if closes not in before:
                return f"the prompt opens {opens!r}, which {said!r} does not close"
        header = prompt[self._end_before(turn, prompt) :]
        ends_closed = header.rstrip().endswith(tuple(closes for _, closes in self._thinks))
        opened = [opens for opens, _ in self._thinks if opens in said]
        if opened and (ends_closed or self._empty_block.search(header)):
            return f"the prompt closes the thoughts, and {said!r} opens {opened[0]!r}"
        return ""

    def _end_before(self, turn: int, prompt: str) -> int:
        """Where in a prompt the last message before the turn that says something ends."""
        said = ((m.get("content") or "").strip() for m in self._messages[:turn][::-1])
        before = next(filter(None, said), "")
        return max(prompt.rfind(before), 0) + len(before) if before else 0

    def _quote_fault(self, turn: int, ids: Sequence[int]) -> str:
        if not self._quotes or turn not in (t for t, _, _ in self._prompts):
            return ""
        prompt, upto = (self._render(turn + k, k == 0, plain=True) or "" for k in (0, 1))
        if not upto.startswith(prompt):
            return ""
        plain = self._controls(self._encode(upto[len(prompt) :]))
        if any(self._controls(ids)[i] > plain[i] for i in self._control_ids if i != ids[-1]):
            return "a quoted token is a control token"
        quoted = [self._encode(end)[0] for end in self._quotes]
        if any(self._controls(ids)[i] > max(plain[i], int(i == ids[-1])) for i in quoted):
            return "a quoted end token ends the turn"
        return ""


def _runs(weights: Sequence[float], cuts: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Where weights above 0 stand, run by run; none goes beyond a cut."""
    at = 0
    for is_trained, run in groupby(weights, key=lambda weight: weight > 0):
        length = len(list(run))
        if is_trained:
            borders = [at, *sorted(cut for cut in set(cuts) if at < cut < at + length), at + length]
            yield from pairwise(borders)
        at += length


def _common_length(one: str, other: str) -> int:
    """Characters with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _dense(text: str) -> str:
    return "".join(text.split())


def _words(message: dict[str, Any]) -> set[str]:
    """Words of at least five letters in all that a message says."""
    said = [message.get(key) or "" for key in ("content", "reasoning_content", "thinking")]
    said.append(json.dumps(message.get("tool_calls", "")))
    return set(re.findall(r"[^\W\d_]{5,}", " ".join(said)))
