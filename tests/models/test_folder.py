"""A model folder that cannot be used is refused with its fault, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from posttrain_dist.errors import ModelError, SeveralErrors
from posttrain_dist.models.folder import check_folder, check_tokenizer, load_tokenizer, resolve

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "intermediate_size": 8,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import numpy as np

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"a": np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def index(folder: Path, weight_map: dict[str, str]) -> None:
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map}))


def test_a_sound_folder_gives_its_config(folder: Path) -> None:
    assert check_folder(folder) == CONFIG
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index(folder, {"a": "one.safetensors"})
    assert check_folder(folder) == CONFIG


def test_a_truncated_shard_is_told_by_its_bytes(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) - 64, 40, 8, 3, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=f"is truncated: {size} bytes") as caught:
            check_folder(folder)
        assert caught.value.where == str(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(ModelError, match="is damaged"):
        check_folder(folder)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        check_folder(folder)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/x.safetensors", "a\\..\\b", "C:x"]
)
def test_an_index_that_leaves_the_folder_is_refused(folder: Path, shard: str) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "secret.safetensors")
    index(folder, {"a": shard})
    with pytest.raises(ModelError, match="outside of the folder"):
        check_folder(folder)


def test_missing_shards_and_tensors_are_reported_together(folder: Path) -> None:
    index(folder, {"a": "model.safetensors", "b": "model.safetensors", "c": "gone.safetensors"})
    with pytest.raises(SeveralErrors) as caught:
        check_folder(folder)
    texts = [str(problem) for problem in caught.value.problems]
    assert "not there: gone.safetensors" in texts[0]
    assert "lacks 1 tensors that the index places in it: b" in texts[1]


def test_a_linked_shard_as_in_the_hub_cache_is_fine(folder: Path, tmp_path_factory: Any) -> None:
    blob = tmp_path_factory.mktemp("blobs") / "f00"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    assert check_folder(folder) == CONFIG


def test_a_folder_without_weights_says_how_to_get_them(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert check_folder(folder, need_weights=False) == CONFIG
    with pytest.raises(ModelError, match=r"has no weights.*\n.*model.weights=random"):
        check_folder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"pytorch_model.bin is not read.*\n.*save_pretrained"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_local_experts": 8}, "mixture-of-experts model (num_local_experts)"),
        ({"num_experts": 64}, "mixture-of-experts model (num_experts)"),
        ({"n_routed_experts": 64}, "mixture-of-experts model (n_routed_experts)"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "mixture-of-experts model (Qwen3Moe"),
        ({"vision_config": {"x": 1}}, "multimodal model (vision_config)"),
        ({"text_config": {"x": 1}}, "multimodal model (text_config)"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["BertForMaskedLM"]}, "not a causal LM"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"model_type": None}, "no model_type"),
    ],
)
def test_architectures_that_do_not_train_here_are_refused(
    folder: Path, change: dict[str, Any], part: str
) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ModelError) as caught:
        check_folder(folder)
    assert part in caught.value.what
    assert caught.value.where == str(folder / "config.json")


def test_a_dense_config_that_names_experts_is_fine(folder: Path) -> None:
    config = CONFIG | {"num_local_experts": 0, "num_experts": 1, "vision_config": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert check_folder(folder) == config


def test_config_and_folder_that_cannot_be_read(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not valid JSON"):
        check_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        check_folder(folder)
    (folder / "export").mkdir()  # as a run has it
    (folder / "export" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"this is a run; the model that it made is .*/export"):
        check_folder(folder)
    with pytest.raises(ModelError, match="no such model folder"):
        resolve(str(folder / "nowhere"))


def test_tiny_base_is_the_package_folder() -> None:
    import posttrain_dist

    package = Path(posttrain_dist.__file__).parent
    assert resolve("tiny_base") == package / "assets" / "tiny_base"


def test_tokenizer_lacks_are_reported_together(tmp_path: Path, builders: Any) -> None:
    builders.tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    check_tokenizer(tokenizer, tmp_path)
    bare = dataclasses.replace(tokenizer, special_tokens_map={}, backend_text="")
    with pytest.raises(SeveralErrors) as caught:
        check_tokenizer(bare, tmp_path)
    no_end, slow = caught.value.problems
    assert no_end.where == str(tmp_path / "tokenizer_config.json")
    assert 'set "eos_token"' in no_end.fix and "add tokenizer.json" in slow.fix
    only_end = {"eos_token": tokenizer.eos_token}  # packed rows need no pad token
    check_tokenizer(dataclasses.replace(tokenizer, special_tokens_map=only_end), tmp_path)
    check_tokenizer(dataclasses.replace(tokenizer, chat_template=None), tmp_path)


def test_a_folder_without_tokenizer_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"^\S+: has no tokenizer\.json, and the tok") as caught:
        load_tokenizer(folder)
    assert caught.value.where == str(folder)
