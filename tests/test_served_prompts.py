"""What the prompts of training rows hold that a server must be told: the day, and thoughts."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from served_exports import config_of, served_of, tokenizer_of, write

from posttrain_dist.errors import DataError


def test_thoughts_in_a_prompt_are_served_under_the_name_that_the_template_reads(
    tiny_llama: Path, builders: Any, tmp_path: Path
) -> None:
    """As gpt-oss, which shows those of a turn that called a tool, and calls them `thinking`."""
    (tmp_path / "thinks.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.thinking %}({{ m.thinking }}){% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    ask, say = ({"role": role, "content": role} for role in ("user", "assistant"))
    thought = {**say, "reasoning_content": "why not"}
    made = [{"messages": [ask, thought, {**ask, "content": f"{n}"}, say]} for n in range(3)]
    rows = builders.write(tmp_path / "rows.jsonl", made)
    config = config_of(tiny_llama, rows, name=str(tmp_path / "thinks.jinja"))
    served = served_of(config, tmp_path / "p")
    tokenizer = tokenizer_of(write(tiny_llama, tmp_path, served))
    assert "(why not)assistant<|end|>" in tokenizer.decode(served.rows[0].token_ids)


def test_rows_that_the_clock_writes_in_have_their_day(
    tiny_llama: Path, builders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export goes on to read the clock; its check shows the day on which it was trained."""
    rows = builders.write(tmp_path / "rows.jsonl", builders.rows(40))
    own = (tiny_llama / "chat_template.jinja").read_text()
    asks = "{{ strftime_now('%Y-%m-%d') }}"
    (tmp_path / "dated.jinja").write_text(asks + own)

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Earlier:
            return cls(2020, 2, 3)

    monkeypatch.setattr("posttrain_dist.prepare.fingerprint.datetime", Earlier)
    served = served_of(config_of(tiny_llama, rows, name=str(tmp_path / "dated.jinja")), tmp_path)
    monkeypatch.undo()
    assert served.templates == {"default": asks + own}
    assert [row.prompt.variables for row in served.rows] == [{"strftime_now": "2020-02-03"}] * 3
    tokenizer = tokenizer_of(write(tiny_llama, tmp_path, served))
    for row in served.rows:
        assert tokenizer.decode(row.token_ids).startswith("2020-02-03")
        assert row.prompt.encode(tokenizer) == row.token_ids


def test_a_row_that_no_server_asks_as_it_is_trained_is_refused(
    tiny_llama: Path, builders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours that would otherwise pass: rows rendered from their last messages only."""
    own = (tiny_llama / "chat_template.jinja").read_text()
    (tmp_path / "last.jinja").write_text(own.replace("in messages", "in messages[-2:]"))
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"t {i}"} for i in range(6)]
    rows = builders.write(tmp_path / "rows.jsonl", [{"messages": turns}] * 2)
    config = config_of(tiny_llama, rows, name=str(tmp_path / "last.jinja"))
    config.data.eval_fraction, config.data.cache = 0.0, str(tmp_path / "cache")
    served = served_of(config, tmp_path / "right")
    tokenizer = tokenizer_of(write(tiny_llama, tmp_path, served))
    assert "t 3" in tokenizer.decode(served.rows[0].token_ids)
    # As long as such a slice was taken for one that is counted from the beginning:
    monkeypatch.setattr(
        "posttrain_dist.data.chat.rendering.causal._is_start", lambda node, starts: True
    )
    config.data.cache = str(tmp_path / "other")
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: the inference prompt .* messages\[3\] begins"
    ):
        served_of(config, tmp_path / "wrong")
