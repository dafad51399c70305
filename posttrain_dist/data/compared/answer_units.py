"""The tokens of a row -> units of samples: a prompt, then the answers that stay beside it.

rows    a unit
------  ----------------------------------------------------------------------------------
pairs   the prompt and all answers; a ranking above the limit becomes a unit for each pair
        of neighbours in rank
labels  the prompt, one answer, and an answer to another prompt (role 1), cut to what is left
scores  the prompt and all answers; above the limit as many as fit, the prompt before them again
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from posttrain_dist.data import LongRows
from posttrain_dist.data.chat.encoder import RowExamples
from posttrain_dist.data.compared.answer_encoder import AnsweredRow, AnswerTokens
from posttrain_dist.data.compared.other_answers import OtherAnswers
from posttrain_dist.data.prepared.trees import numbered, repeat_beginnings
from posttrain_dist.flow import Example, Record

_LATER = -1  # channels and samples have numbers once the rows of all files are known
_PROMPT, _ANSWER, _OTHER = -1, 0, 1  # role_S

Said = tuple[int, AnswerTokens]  # role, answer


class UnitMaker:
    """Makes units of the rows of one unit of a file, in their order.

    Args:
        rows: what the objective reads: "pairs", "labels" or "scores".
        own_rows: the only target of an answer is its last token.
        max_length: tokens of a unit at most.
        long_rows: what becomes of longer ones: `truncate` or `drop`.
        share_prompt: whether the prompt is a sample that the answers follow; else it stands
            before each of them.
    """

    def __init__(
        self,
        rows: str,
        own_rows: bool,
        max_length: int,
        long_rows: LongRows,
        share_prompt: bool = True,
    ) -> None:
        self._rows, self._own_rows, self._share_prompt = rows, own_rows, share_prompt
        self._max_length, self._long_rows = max_length, long_rows
        self._others = OtherAnswers() if rows == "labels" else None

    def add(self, record: Record, row: AnsweredRow) -> Iterator[tuple[Record, RowExamples]]:
        """The rows that are ready with this one."""
        if self._others is None:
            yield record, self._made(row, [])
            return
        for ready, answered, others in self._others.add(record, row):
            yield ready, self._made(answered, others)

    def finish(self) -> Iterator[tuple[Record, RowExamples]]:
        """The rows that are left when there are no more."""
        if self._others is not None:
            for ready, answered, others in self._others.finish():
                yield ready, self._made(answered, others)

    def _made(self, row: AnsweredRow, others: Sequence[AnswerTokens]) -> RowExamples:
        found = RowExamples([], list(row.faults))
        for said in self._groups(row, others, found.faults):
            fitting = self._fitted(self._prompt_tokens(row, said), said, found.faults)
            if fitting:
                unit = self._unit(row, fitting, found.faults)
                unit = unit if self._share_prompt else repeat_beginnings(unit)
                found.examples.extend(numbered(unit, len(found.examples)))
        return found

    def _prompt_tokens(self, row: AnsweredRow, said: Sequence[Said]) -> int:
        """That a unit takes beside its answers."""
        return len(row.prompt_L) * (1 if self._share_prompt else len(said))

    def _groups(
        self, row: AnsweredRow, others: Sequence[AnswerTokens], faults: list[str]
    ) -> list[list[Said]]:
        """The answers that stand in one unit."""
        answers: list[Said] = [(_ANSWER, answer) for answer in row.answers]
        if self._rows == "labels":
            if not others:
                _note(faults, "no_other_answer")
                return [[each] for each in answers]
            return [[each, (_OTHER, others[i % len(others)])] for i, each in enumerate(answers)]
        if self._rows == "scores":
            return self._filled(row, answers)
        if len(answers) == 2 or self._fits(row, answers):
            return [answers]
        _note(faults, "long_ranking")
        ordered = sorted(answers, key=lambda each: -each[1].value)
        values = sorted({answer.value for answer in row.answers}, reverse=True)
        above = dict(pairwise(values))  # value -> the next lower one
        return [
            [one, other]
            for one in ordered
            for other in ordered
            if above.get(one[1].value) == other[1].value
        ]

    def _filled(self, row: AnsweredRow, answers: Sequence[Said]) -> list[list[Said]]:
        """As many answers in each unit as fit: nothing compares them."""
        groups: list[list[Said]] = [[]]
        for each in answers:
            if groups[-1] and not self._fits(row, [*groups[-1], each]):
                groups.append([])
            groups[-1].append(each)
        return groups

    def _fits(self, row: AnsweredRow, said: Sequence[Said]) -> bool:
        total = self._prompt_tokens(row, said) + sum(len(answer.ids_L) for _, answer in said)
        return total <= self._max_length

    def _fitted(self, prompt_tokens: int, said: list[Said], faults: list[str]) -> list[Said]:
        """The answers, cut to what the prompt leaves; none: the unit is left out."""
        room = self._max_length - prompt_tokens
        said = _without_borrowed_room(said, room)
        lengths = [len(answer.ids_L) for _, answer in said]
        if sum(lengths) <= room:
            return said
        if self._long_rows is LongRows.drop:
            return []
        if room < len(said):
            _note(faults, "truncated_target")
            return []
        cut = [
            (role, _cut(answer, length))
            for (role, answer), length in zip(said, _even(lengths, room), strict=True)
        ]
        if any(not answer.weight_L.any() for _, answer in cut):
            _note(faults, "truncated_target")
            return []
        compared = [answer for role, answer in cut if role == _ANSWER]
        if self._rows == "pairs" and np.array_equal(compared[0].ids_L, compared[1].ids_L):
            _note(faults, "equal_answers")
            return []
        if not all(answer.ends for _, answer in cut):
            _note(faults, "end_of_turn")
        return cut

    def _unit(self, row: AnsweredRow, said: Sequence[Said], faults: list[str]) -> list[Example]:
        """The samples; `parent` and `unit` count from the first of them."""
        truncated = any(answer.truncated for role, answer in said if role == _ANSWER)
        nothing_L = np.zeros(len(row.prompt_L), np.float32)
        extra = {"role_S": _PROMPT, "value_S": 0.0, "margin_S": 0.0}
        found = [Example(row.prompt_L, nothing_L, _LATER, _LATER, truncated, extra, unit=0)]
        for role, answer in said:
            weight_L = answer.weight_L
            if self._own_rows:
                weight_L = np.zeros(len(weight_L), np.float32)
                weight_L[-1] = 1
                if not answer.ends:
                    _note(faults, "end_of_turn")
            is_own = role == _ANSWER
            extra = {
                "role_S": role,
                "value_S": answer.value if is_own else 0.0,
                "margin_S": answer.margin if is_own else 0.0,
            }
            found.append(
                Example(
                    answer.ids_L,
                    weight_L,
                    _LATER,
                    _LATER,
                    answer.truncated,
                    extra,
                    parent=0,
                    unit=0,
                )
            )
        return found


def _without_borrowed_room(said: list[Said], room: int) -> list[Said]:
    """An answer to another prompt gets what its row leaves: no answer is cut for it."""
    left = room - sum(len(answer.ids_L) for role, answer in said if role == _ANSWER)
    found = []
    for role, answer in said:
        if role == _OTHER:
            answer = _cut(answer, min(max(left, 0), len(answer.ids_L)))
            if not answer.weight_L.any():
                continue
        found.append((role, answer))
    return found


def _even(lengths: Sequence[int], room: int) -> list[int]:
    """Lengths that fill `room`: the longest are cut, all to one length (the first to one more)."""
    cap, left = 0, room
    for done, length in enumerate(sorted(lengths)):
        cap = left // (len(lengths) - done)
        if length > cap:
            break
        left -= length
    kept = [min(length, cap) for length in lengths]
    spare = room - sum(kept)
    for i, length in enumerate(lengths):
        if spare and length > kept[i]:
            kept[i] += 1
            spare -= 1
    return kept


def _cut(answer: AnswerTokens, length: int) -> AnswerTokens:
    if length == len(answer.ids_L):
        return answer
    ids_L, weight_L = answer.ids_L[:length].copy(), answer.weight_L[:length].copy()
    return replace(answer, ids_L=ids_L, weight_L=weight_L, ends=False, truncated=True)


def _note(faults: list[str], name: str) -> None:
    if name not in faults:
        faults.append(name)
