"""Exact match, the choice of rows, and answers.json, on a tiny random Llama."""

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import DataError
from posttrain_dist.evaluation import answers
from posttrain_dist.models import ModelConfig, Weights

BYTE_LLAMA = Path(__file__).parents[1] / "generation" / "byte_llama.py"
byte_llama = SimpleNamespace(**runpy.run_path(str(BYTE_LLAMA)))
greedy = byte_llama.greedy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_llama.save(tmp_path_factory.mktemp("llama"))


def row(channel: str, prompt: str, answer: str, check: str | None) -> dict:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "task_type": channel, "check": check}


def test_exact_match_counts() -> None:
    rows = [
        row("add", "1+1", "2", "exact"),
        row("add", "1+2", "3", "exact"),
        row("add", "2+2", "4", "exact"),
        row("sort", "b a", "a b", "exact"),
        row("prose", "write", "x", None),
    ]
    rows[0]["messages"] = [*rows[1]["messages"], *rows[0]["messages"]]  # the LAST turn counts
    given = [" 2\n", "3.", "4", "A B", "x"]
    assert answers.exact_match(rows, given) == {
        "add": {"right": 2, "of": 3},
        "sort": {"right": 0, "of": 1},
    }


def test_thoughts_are_no_part_of_an_exact_answer() -> None:
    rows = [row("add", "1+1", "2", "exact") for _ in range(5)]
    rows[4]["messages"][1]["content"] = "<think>one and one</think>\n\n2"
    given = ["<think>is it 3?</think>\n2", "a</think>b</think> 2 ", "<think>2", "2</think>", "2"]
    assert answers.exact_match(rows, given) == {"add": {"right": 3, "of": 5}}


@pytest.fixture
def run_folder(tmp_path: Path, folder: Path) -> Path:
    """Held-out rows of three channels; the export answers as the base does."""
    rows = [row("add", f"{i}+{i}", str(2 * i), "exact") for i in range(4)]
    rows[1]["messages"][1]["content"] = greedy(folder, rows[1]["messages"][:1], 8)
    rows += [row("doc", f"doc {i}\u2028", f"d{i}", None) for i in range(3)]
    rows += [row("tale", f"tale {i}", f"t{i}", None) for i in range(3)]
    rows.append({"messages": [], "task_type": "text", "check": None})
    (tmp_path / "prepared").mkdir()
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (tmp_path / "prepared" / "heldout_records.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "export").symlink_to(folder)
    return tmp_path


def test_compare_answers_with_base_and_export(run_folder: Path, folder: Path) -> None:
    config = RunConfig(model=ModelConfig(path=str(folder)))
    config.eval.generate_rows, config.eval.samples, config.eval.max_new_tokens = 3, 3, 8
    found = answers.compare(config, run_folder)
    assert found == json.loads((run_folder / "answers.json").read_text(encoding="utf-8"))
    assert found["exact_match"] == {
        "before": {"add": {"right": 1, "of": 3}},
        "after": {"add": {"right": 1, "of": 3}},
    }
    order = [(s["channel"], s["prompt"], s["reference"]) for s in found["samples"]]
    assert order == [
        ("doc", "doc 0\u2028", "d0"),
        ("tale", "tale 0", "t0"),
        ("doc", "doc 1\u2028", "d1"),
    ]
    for sample in found["samples"]:
        expected = greedy(folder, [{"role": "user", "content": sample["prompt"]}], 8)
        assert sample["before"] == sample["after"] == expected


def test_compare_with_random_weights_has_no_before(run_folder: Path) -> None:
    config = RunConfig(model=ModelConfig(path="nowhere", weights=Weights.random))
    config.eval.generate_rows, config.eval.samples, config.eval.max_new_tokens = 2, 1, 2
    found = answers.compare(config, run_folder)
    assert found["exact_match"] == {"before": {}, "after": {"add": {"right": 0, "of": 2}}}
    assert [s["before"] for s in found["samples"]] == [""]


def test_the_base_model_is_asked_with_the_template_and_the_ends_of_the_export(
    tmp_path: Path, folder: Path
) -> None:
    """Each row with its own tools and variables; the base folder has a template of its own."""
    base, export = tmp_path / "base", tmp_path / "export"
    shutil.copytree(folder, base)
    shutil.copytree(folder, export)
    (base / "chat_template.jinja").write_text("{{ raise_exception('the old one') }}")
    start = "{{ mood }}{% for tool in tools or [] %}{{ tool.name }}{% endfor %}"
    (export / "chat_template.jinja").write_text(start + byte_llama.TEMPLATE)
    rows = [row("doc", "a", "x", None), row("tale", "b", "y", None), row("first", "c", "z", None)]
    rows[0] |= {"chat_template_kwargs": {"mood": "low"}, "tools": [{"name": "f"}]}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows[1]["messages"].append(call)  # an answer without words
    rows[2]["messages"] = [call, *rows[2]["messages"][:1]]  # nothing stands before the answer
    (tmp_path / "prepared").mkdir()
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "prepared" / "heldout_records.jsonl").write_text(lines)
    config = RunConfig(model=ModelConfig(path=str(base)))
    config.eval.samples, config.eval.max_new_tokens = 3, 6
    texts = {
        "doc": "lowf<|user|>a<|end|><|assistant|>",
        "tale": "<|user|>b<|end|><|assistant|>y<|end|><|assistant|>",
    }
    found = answers.compare(config, tmp_path)["samples"]
    assert [sample["channel"] for sample in found] == ["doc", "tale"]
    assert found[1]["prompt"] == "user: b\nassistant: y" and found[1]["reference"] == ""
    for sample in found:
        expected = greedy(folder, texts[sample["channel"]], 6)
        assert sample["before"] == sample["after"] == expected


def test_missing_held_out_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"heldout_records\.jsonl.*held-out"):
        answers.compare(RunConfig(), tmp_path)
