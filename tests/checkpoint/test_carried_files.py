"""What of a model folder stands in its export beside the weights, and how generation pads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain_dist.checkpoint.carried_files import carry_files
from posttrain_dist.checkpoint.hf_folder import RunFacts, write_hf_folder
from posttrain_dist.files import read_object


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_llama, tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**read_object(file), **values}))


def export(model: Path, said: list[str]) -> Path:
    """With one weight."""
    return write_hf_folder(
        [("w", torch.ones(2))], model, model.parent / "export", dtype=torch.bfloat16,
        facts=RunFacts(end_token_ids=[7]), notice=said.append,
    )  # fmt: skip


def test_only_what_a_model_needs_is_carried(model: Path, tmp_path: Path) -> None:
    carried = (
        *("LICENSE", "NOTICE.txt", "USE_POLICY.md", "merges.txt", "vocab.json", "spiece.model"),
        *("tokenizer.model.v3", "qwen.tiktoken", "tekken.json", "added_tokens.json"),
        "special_tokens_map.json",
    )
    left = (
        *("README.md", "pytorch_model.bin", "optimizer.pt", "tokenization_x.py", "license.py"),
        *("model-00001-of-00002.safetensors", "trainer_state.json", "chat_template.json"),
        "preprocessor_config.json",
    )
    for name in (*carried, *left):
        (model / name).write_text("{}")
    for name in ("tokenizer", "LICENSES", "vocab.d", "additional_chat_templates"):
        (model / name).mkdir()
        (model / name / "inside.jinja").write_text("{}")
    (model / "NOTICE").symlink_to("nowhere")
    (model / "notices").symlink_to(model / "tokenizer")
    (model / "USE_POLICY").symlink_to(model / "LICENSE")
    with (model / "huge.model").open("wb") as stream:
        stream.truncate(1 << 30)  # no room on the disk
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": "x.X"}, chat_template="old")
    known = {*carried, "tokenizer.json", "tokenizer_config.json", "USE_POLICY"}
    for templates in (False, True):
        said: list[str] = []
        out = tmp_path / f"out-{templates}"
        out.mkdir()
        carry_files(model, out, templates=templates, notice=said.append)
        own = {"chat_template.jinja", "chat_template.json", "additional_chat_templates"}
        assert {path.name for path in out.iterdir()} == known | (own if templates else set())
        assert not any(path.is_symlink() for path in out.iterdir())
        assert len(said) == 1 and "huge.model is not carried" in said[0]
        written = read_object(out / "tokenizer_config.json")
        assert "auto_map" not in written and ("chat_template" in written) == templates
        assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert [path.name for path in (out / "additional_chat_templates").iterdir()] == ["inside.jinja"]


def test_the_config_names_no_code_and_the_dtype_that_is_written(model: Path) -> None:
    change(model / "config.json", auto_map={"AutoModel": "x.X"}, torch_dtype="float16")
    before = read_object(model / "config.json")
    del before["auto_map"], before["torch_dtype"]
    assert read_object(export(model, []) / "config.json") == {**before, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("tokenizer", "generation", "expected"),
    [
        ({"pad_token": None}, {}, 7),  # none anywhere: an end token, and it is said
        ({"pad_token": None}, {"pad_token_id": 2}, 2),
        ({}, {"pad_token_id": None}, None),  # the tokenizer has one
    ],
)
def test_a_pad_token_is_set_where_generation_has_none(
    model: Path, tokenizer: Any, generation: Any, expected: int | None
) -> None:
    change(model / "tokenizer_config.json", **tokenizer)
    (model / "generation_config.json").write_text(json.dumps(generation))
    said: list[str] = []
    written = read_object(export(model, said) / "generation_config.json")
    assert written.get("pad_token_id") == expected
    assert any("no pad token" in line for line in said) == (expected == 7)


def test_a_generation_config_that_is_no_json_is_left_out(model: Path) -> None:
    (model / "generation_config.json").write_text("{")
    said: list[str] = []
    assert read_object(export(model, said) / "generation_config.json") == {"eos_token_id": 7}
    assert "generation_config.json is not carried" in said[0]
