"""One sample of each turn: which rows give none, and how much memory many samples take."""

from __future__ import annotations

import runpy
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.data import Form, LongRows, Template
from posttrain_dist.data.chat import encoder as masking
from posttrain_dist.data.chat.checks.check_table import CHECKS
from posttrain_dist.data.chat.encoder import Encoder
from posttrain_dist.errors import DataError
from posttrain_dist.flow import Example, Record

one = runpy.run_path(str(Path(__file__).with_name("supervised_text.py")))["one"]

TokenizerOf = Callable[..., Any]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def record(messages: Sequence[dict[str, Any]], *weights: float | None) -> Record:
    return Record(channel="c", where="r.jsonl:7", messages=tuple(messages), weights=weights)


def encoder(tokenizer: Any, max_length: int = 999, **choice: Any) -> Encoder:
    choice = {"name": "chatml", "form": Form.turns, **choice}
    return Encoder(tokenizer, Template(**choice), max_length=max_length)


def test_a_row_that_is_switched_off_is_refused(family_tokenizer: TokenizerOf) -> None:
    tokenizer = family_tokenizer("chatml")
    off = record(CHAT * 2, None, 0.0, None, 0.0)
    for form in (Form.turns, Form.conversation):
        with pytest.raises(DataError, match=r"r\.jsonl:7: .*no supervised token") as caught:
            encoder(tokenizer, form=form).encode(off)
        assert caught.value.fix == CHECKS["no_target"].fix
        kept = one(encoder(tokenizer, form=form, strict=False).encode(off))
        assert (kept.faults, kept.weight_L.any()) == (("no_target",), False)


def test_weight_on_another_role_is_refused(family_tokenizer: TokenizerOf) -> None:
    tokenizer = family_tokenizer("chatml")
    with pytest.raises(DataError, match=r"r\.jsonl:7: messages\[2\] is of the user") as caught:
        encoder(tokenizer, strict=False).encode(record(CHAT * 2, None, None, 1.0, None))
    assert "template.form=conversation" in caught.value.fix
    assert len(encoder(tokenizer).encode(record(CHAT * 2, 0.0, None, None, 0.0)).examples) == 1


def test_batches_are_bounded_in_characters(
    family_tokenizer: TokenizerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = family_tokenizer("chatml")
    rows = [record([CHAT[0], {"role": "assistant", "content": "x" * n}]) for n in range(1, 90)]
    expected = encoder(tokenizer).encode_many(rows)
    seen: list[int] = []
    ours = encoder(tokenizer)
    inner = ours._texts.tokenise

    def counted(batch: Any) -> Any:
        batch = list(batch)
        seen.append(sum(len(each.text) for each in batch))
        return inner(batch)

    monkeypatch.setattr(ours._texts, "tokenise", counted)
    monkeypatch.setattr(masking, "_BATCH_CHARACTERS", 500)
    for found, wanted in zip(ours.encode_many(rows), expected, strict=True):
        assert not isinstance(found, DataError) and not isinstance(wanted, DataError)
        assert [e.input_ids_L.tolist() for e in found[0]] == [
            e.input_ids_L.tolist() for e in wanted[0]
        ]
        assert [e.weight_L.tolist() for e in found[0]] == [e.weight_L.tolist() for e in wanted[0]]
    assert len(seen) > 10 and max(seen) < 500 + 200


def test_samples_of_a_long_row_are_not_held_in_whole(family_tokenizer: TokenizerOf) -> None:
    """What is kept of samples that are cut grows with their number, not with its square."""
    tokenizer = family_tokenizer("chatml")
    messages = [{"role": m["role"], "content": "word " * 20} for m in CHAT * 60]
    ours = encoder(tokenizer, max_length=64)
    ours.encode(record(CHAT))
    tracemalloc.start()
    kept, _, _ = ours.encode(record(messages))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < len(kept) * (64 * 8 + 1000) + 100_000
    assert all(e.input_ids_L.base is None for e in kept)


@pytest.mark.parametrize("long_rows", list(LongRows))
@pytest.mark.parametrize("limit", [20, 60, 61, 62, 63, 64, 65, 200])
def test_turns_behind_the_limit_are_left_out(
    family_tokenizer: TokenizerOf,
    monkeypatch: pytest.MonkeyPatch,
    long_rows: LongRows,
    limit: int,
) -> None:
    """All samples that hold a target, against those of each turn as a row of its own."""
    tokenizer = family_tokenizer("chatml")
    monkeypatch.setattr(masking, "_BATCH_CHARACTERS", 1)
    row = record([{**m, "content": m["content"] + " the user" * 3} for m in CHAT * 9])
    choice = Template(name="chatml", form=Form.turns)
    ours = Encoder(tokenizer, choice, max_length=limit, long_rows=long_rows)
    inner, tokenised = ours._texts.tokenise, []

    def noted(batch: Any) -> Any:
        tokenised.extend(batch)
        return inner(batch)

    monkeypatch.setattr(ours._texts, "tokenise", noted)
    found, faults, _ = ours.encode(row)
    monkeypatch.setattr(ours._texts, "tokenise", inner)
    alone: list[Example] = []
    faults_alone: set[str] = set()
    for turn in range(1, 18, 2):
        weights = tuple(float(i == turn) for i in range(turn + 1))
        result = ours.encode(replace(row, messages=row.messages[: turn + 1], weights=weights))
        alone += result.examples
        faults_alone |= set(result.faults)
    wanted = [e for e in alone if e.weight_L.any()]
    kept = [e for e in found if e.weight_L.any()]
    assert [e.input_ids_L.tolist() for e in kept] == [e.input_ids_L.tolist() for e in wanted]
    assert [e.weight_L.tolist() for e in kept] == [e.weight_L.tolist() for e in wanted]
    assert set(faults) == faults_alone
    assert [e.truncated for e in found] == [e.truncated for e in alone]
    assert [e.input_ids_L.tolist() for e in found] == [e.input_ids_L.tolist() for e in alone]
    if long_rows is not LongRows.split and limit < 200:
        assert len(tokenised) < 9
