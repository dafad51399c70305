"""The group `template` and the clock: what of them a prepared folder is made of."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, complete
from posttrain_dist.data import Form, Template, Thinking
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.data.prepared.summary import Summary
from posttrain_dist.errors import DataError
from posttrain_dist.models.folder import load_tokenizer
from posttrain_dist.prepare import prepare, prepare_cached


@pytest.fixture
def make(tiny_llama: Path, builders: Any, tmp_path: Path) -> Any:
    rows = [builders.chat(f"t {i}", "a", "t") for i in range(3)]
    data = builders.write(tmp_path / "rows.jsonl", rows)

    def config(**template: Any) -> RunConfig:
        values = {"max_length": 64, "eval_fraction": 0.0, "cache": str(tmp_path / "c")}
        return complete(
            RunConfig(
                model=ModelConfig(path=str(tiny_llama)),
                data=DataConfig(train=str(data), **values),
                template=Template(**template),
            )
        )

    return config


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"variables": {"mood": "dry"}}, {"variables": {"mood": "warm"}}),
        ({"form": Form.turns}, {"form": Form.conversation}),
        ({"thinking": Thinking.keep}, {"thinking": Thinking.none}),
    ],
)
def test_the_group_template_is_part_of_the_key(
    make: Any, tmp_path: Path, tiny_llama: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    own = (tiny_llama / "chat_template.jinja").read_text()
    (tmp_path / "moody.jinja").write_text("{{ mood }}" + own)
    config, changed = (make(name=str(tmp_path / "moody.jinja"), **each) for each in (one, other))
    prepare(config, tmp_path / "p")
    assert prepare_cached(changed) != prepare_cached(config)
    with pytest.raises(DataError, match=f"other input: {next(iter(one))} changed since"):
        prepare(changed, tmp_path / "p")


def test_a_template_that_reads_the_clock_is_said_once_with_its_date(
    make: Any, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (tiny_llama / "chat_template.jinja").read_text()
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %B %Y') }}" + own)

    def at(day: str, **variables: str) -> RunConfig:
        class Then(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Then:
                return cls.fromisoformat(day)

        monkeypatch.setattr("posttrain_dist.prepare.fingerprint.datetime", Then)
        return make(name=str(tmp_path / "dated.jinja"), variables=variables)  # type: ignore[no-any-return]

    said: list[str] = []
    prepare(at("2026-02-03"), tmp_path / "p", say=said.append)
    (line,) = (line for line in said if "today" in line)
    assert "2026-02-03" in line and "template.variables" in line
    tokenizer = load_tokenizer(tiny_llama)
    first = Examples.open(tmp_path / "p", "train")[0].input_ids_L.tolist()
    assert tokenizer.decode(first).startswith("03 February 2026")
    # A run goes on another day with what it has; a new one gets the new date.
    before = Summary.read(tmp_path / "p")
    assert prepare(at("2026-02-04"), tmp_path / "p") == before
    prepare(at("2026-02-04"), tmp_path / "q")
    later = Examples.open(tmp_path / "q", "train")[0].input_ids_L.tolist()
    assert tokenizer.decode(later).startswith("04 February 2026")
    # Fixed, it is nobody's surprise.
    said.clear()
    prepare(at("2026-02-05", strftime_now="2024-07-26"), tmp_path / "r", say=said.append)
    assert not any("today" in line for line in said)
    fixed = Examples.open(tmp_path / "r", "train")[0].input_ids_L.tolist()
    assert tokenizer.decode(fixed).startswith("26 July 2024")
