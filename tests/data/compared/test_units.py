"""Units of rows with answers: what stands together, what is cut, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest

from posttrain_dist.data import LongRows
from posttrain_dist.data.chat.encoder import RowExamples
from posttrain_dist.data.compared.answer_encoder import AnsweredRow, AnswerTokens
from posttrain_dist.data.compared.answer_units import UnitMaker
from posttrain_dist.flow import Example, Record

RECORD = Record(channel="c", where="rows.jsonl:7")


def answer(ids: range | list[int], value: float = 0.0, margin: float = 0.0) -> AnswerTokens:
    ids_L = np.array(ids, np.int32)
    return AnswerTokens(ids_L, np.ones(len(ids_L), np.float32), value, margin)


def answered(prompt: range, *answers: AnswerTokens) -> AnsweredRow:
    return AnsweredRow(np.array(prompt, np.int32), list(answers))


def made(
    row: AnsweredRow,
    limit: int,
    rows: str = "pairs",
    own_rows: bool = False,
    long_rows: LongRows = LongRows.truncate,
) -> RowExamples:
    maker = UnitMaker(rows, own_rows, limit, long_rows)
    ((_, found),) = [*maker.add(RECORD, row), *maker.finish()]
    return found


def units(found: RowExamples) -> list[list[Example]]:
    """The samples by unit, each with its parent before it."""
    grouped: dict[int | None, list[Example]] = {}
    for place, example in enumerate(found.examples):
        first = grouped.setdefault(example.unit, [])
        assert example.parent == (example.unit if first else None)
        assert first or example.unit == place
        first.append(example)
    return list(grouped.values())


def ids(unit: list[Example]) -> list[list[int]]:
    return [example.input_ids_L.tolist() for example in unit]


def worth(unit: list[Example]) -> list[tuple[float, ...]]:
    names = ("role_S", "value_S", "margin_S")
    return [tuple(float(np.asarray(e.extra[name])) for name in names) for e in unit]


PAIR = answered(range(10), answer(range(10, 20), 1.0, 0.5), answer(range(30, 34)))


def test_a_pair_is_one_unit_with_what_each_answer_is_worth() -> None:
    (unit,) = units(made(PAIR, 24))
    assert ids(unit) == [[*range(10)], [*range(10, 20)], [*range(30, 34)]]
    assert worth(unit) == [(-1, 0, 0), (0, 1, 0.5), (0, 0, 0)]
    assert [example.weight_L.sum() for example in unit] == [0, 10, 4]
    assert not any(example.truncated for example in unit)


@pytest.mark.parametrize(
    ("limit", "lengths"), [(23, (9, 4)), (20, (6, 4)), (17, (4, 3)), (12, (1, 1))]
)
def test_the_longest_answers_are_cut_to_one_length(limit: int, lengths: tuple[int, int]) -> None:
    found = made(PAIR, limit)
    (unit,) = units(found)
    assert tuple(len(example.input_ids_L) for example in unit[1:]) == lengths
    assert sum(map(len, ids(unit))) == limit  # nothing is given away
    assert [e.truncated for e in unit] == [True, True, lengths[1] < 4]
    assert found.faults == ["end_of_turn"]


@pytest.mark.parametrize("limit", [9, 10, 11])
def test_a_prompt_that_fills_the_length_is_named(limit: int) -> None:
    assert made(PAIR, limit) == ([], ["truncated_target"], False)


def test_what_is_too_long_is_dropped_on_request() -> None:
    assert made(PAIR, 23, long_rows=LongRows.drop).examples == []
    assert len(made(PAIR, 24, long_rows=LongRows.drop).examples) == 3


def test_answers_that_are_the_same_behind_the_cut_are_left_out() -> None:
    row = answered(range(10), answer([5, 6, 7, 8], 1.0), answer([5, 6, 7, 9]))
    assert made(row, 16) == ([], ["equal_answers"], False)
    assert len(made(row, 18).examples) == 3


def test_a_ranking_above_the_limit_becomes_pairs_of_neighbours() -> None:
    given = [answer([20 + i] * 3, value) for i, value in enumerate((0.0, 2.0, 1.0, 1.0))]
    row = answered(range(10), *given)
    (whole,) = units(made(row, 22))
    assert [value for _, value, _ in worth(whole)[1:]] == [0, 2, 1, 1]
    found = made(row, 21)
    compared = [[e.input_ids_L[0] for e in unit[1:]] for unit in units(found)]
    assert compared == [[21, 22], [21, 23], [22, 20], [23, 20]]  # 2 over 1, and 1 over 0
    assert all(unit[0].input_ids_L.tolist() == [*range(10)] for unit in units(found))
    assert found.faults == ["long_ranking"]


def test_a_group_above_the_limit_repeats_its_prompt() -> None:
    row = answered(range(10), answer(range(3), 0.5), answer(range(4), 0.25), answer(range(2), 1.0))
    assert len(units(made(row, 19, "scores"))) == 1
    found = made(row, 17, "scores")
    assert [worth(unit)[1:] for unit in units(found)] == [[(0, 0.5, 0), (0, 0.25, 0)], [(0, 1, 0)]]
    assert [ids(unit)[0] for unit in units(found)] == [[*range(10)]] * 2
    found = made(row, 16, "scores")
    assert [len(unit) for unit in units(found)] == [2, 3]
    assert not found.faults


def test_of_own_rows_the_last_token_alone_is_a_target() -> None:
    (unit,) = units(made(PAIR, 20, own_rows=True))
    assert [example.weight_L.tolist() for example in unit[1:]] == [[0] * 5 + [1], [0] * 3 + [1]]


# ------------------------------------------------------------------- answers to another prompt


def test_a_labelled_answer_has_that_of_the_next_other_prompt_beside_it() -> None:
    """Rows 1 and 2 share a prompt; the last row takes from the first; another channel is apart."""
    maker = UnitMaker("labels", False, 99, LongRows.truncate)
    prompts = [range(1), range(1, 3), range(1, 3), range(5), range(7)]
    found: dict[str, RowExamples] = {}
    for number, prompt in enumerate(prompts):
        record = Record(channel="d" if number == 3 else "c", where=str(number))
        row = answered(prompt, answer([100 + number], float(number % 2)))
        found |= {ready.where: made for ready, made in maker.add(record, row)}
    assert list(found) == ["0", "1", "2"]  # what is known so far
    found |= {ready.where: made for ready, made in maker.finish()}
    others = {}
    for where, made_of in found.items():
        ((prompt_S, own, other),) = units(made_of)
        assert prompt_S.input_ids_L.tolist() == [*prompts[int(where)]]
        assert own.input_ids_L.tolist() == [100 + int(where)]
        assert worth([own, other]) == [(0, int(where) % 2, 0), (1, 0, 0)]
        assert other.weight_L.all()
        others[where] = int(other.input_ids_L[0])
    assert others == {"0": 101, "1": 104, "2": 104, "3": 100, "4": 100}


def test_of_a_converted_pair_both_answers_are_units() -> None:
    maker = UnitMaker("labels", False, 99, LongRows.truncate)
    first = answered(range(1), answer([10], 1.0), answer([11], 0.0))
    second = answered(range(2), answer([20], 1.0), answer([21], 0.0))
    found = [*maker.add(RECORD, first), *maker.add(RECORD, second), *maker.finish()]
    values = [[ids(unit)[1:] for unit in units(made_of)] for _, made_of in found]
    assert values == [[[[10], [20]], [[11], [21]]], [[[20], [10]], [[21], [11]]]]


def test_where_all_rows_have_one_prompt_there_is_no_other_and_that_is_told() -> None:
    found = made(answered(range(3), answer([9], 1.0)), 99, "labels")
    (unit,) = units(found)
    assert len(unit) == 2 and found.faults == ["no_other_answer"]


@pytest.mark.parametrize(
    ("limit", "own", "other"),
    [
        (10, [20, 21, 22, 23], [60, 61, 62]),  # what the row leaves
        (7, [20, 21, 22, 23], []),  # nothing is left
        (6, [20, 21, 22], []),  # ... and the answer itself is too long
    ],
)
@pytest.mark.parametrize("long_rows", [LongRows.truncate, LongRows.drop])
def test_no_answer_is_cut_for_one_to_another_prompt(
    limit: int, own: list[int], other: list[int], long_rows: LongRows
) -> None:
    maker = UnitMaker("labels", False, limit, long_rows)
    first = answered(range(3), answer(range(20, 24), 1.0))
    second = answered(range(2), answer(range(60, 66), 0.0))
    found = [*maker.add(RECORD, first), *maker.add(RECORD, second), *maker.finish()][0][1]
    fits = len(own) == 4
    if not fits and long_rows is LongRows.drop:
        assert not found.examples
        return
    (unit,) = units(found)
    assert ids(unit)[1:] == [own, *([other] if other else [])]
    assert ("end_of_turn" in found.faults) is not fits
    assert unit[0].truncated is not fits
