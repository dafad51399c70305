"""Tokenizers without transformers are those of transformers: read directly, sent, kept on disk."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain_dist.models.folder import resolve
from posttrain_dist.models.tokenizer import ModelTokenizer, read_tokenizer, tokenizer_cache
from posttrain_dist.models.tokenizer.plain_files import MODEL_TYPES, read_plain
from posttrain_dist.models.tokenizer.transformers_child import read_by_transformers

TEXTS = [
    "the user asks 12 questions",
    "<|start|>user\nhello<|end|>\n  <|start|>assistant\n",
    " <s>ünï 你好 \U0001f600\n\n\t </s>",
    "",
]
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def make(folder: Path, *, model_type: str = "llama", **settings: Any) -> Path:
    """A folder as Hugging Face's: byte-level BPE with a begin, an end and other special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = ["<|bos|>", "<|end|>", "<|start|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(name, normalized=False) for name in names],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the user asks the assistant a question", "hello hello"], trainer)
    inner.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "model_max_length": 1000,
        **settings,
    }
    written = {name: value for name, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def assert_same(ours: ModelTokenizer, theirs: Any) -> None:
    """Every field and property that our code looks at, and the tokens of some texts."""
    names = ("bos", "eos", "pad", "unk")
    for name in [f"{name}_token_id" for name in names] + [
        *("bos_token", "eos_token", "special_tokens_map", "all_special_tokens"),
        *("all_special_ids", "chat_template", "is_fast"),
    ]:
        assert getattr(ours, name) == getattr(theirs, name), name
    added = {i: repr(token) for i, token in theirs.added_tokens_decoder.items()}
    assert {i: repr(token) for i, token in ours.added_tokens_decoder.items()} == added
    inner, outer = ours.backend_tokenizer, theirs.backend_tokenizer
    assert json.loads(inner.to_str()) == json.loads(outer.to_str())
    assert inner.encode_special_tokens == outer.encode_special_tokens
    for text in TEXTS:
        for special in (False, True):
            mine = inner.encode(text, add_special_tokens=special)
            other = outer.encode(text, add_special_tokens=special)
            assert (mine.ids, mine.offsets) == (other.ids, other.offsets)
        ids = inner.encode(text).ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    for token in ("<|end|>", "the", "nowhere"):
        assert ours.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token)


ADDED = {
    str(i): {"content": name, **FLAGS, "special": name != "<think>"}
    for i, name in enumerate(["<|bos|>", "<|end|>", "<|start|>", "<|pad|>"])
}
PLAIN: dict[str, dict[str, Any]] = {
    "as a repository has it": {"added_tokens_decoder": ADDED, "clean_up_tokenization_spaces": True},
    "backend": {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|start|>"]},
    "objects": {"eos_token": {"__type": "AddedToken", "content": "<|end|>", **FLAGS}},
    "added bos": {"add_bos_token": True, "add_eos_token": True},
    "older list": {"additional_special_tokens": ["<|start|>", "<|end|>"]},
    "no bos, no template": {"bos_token": None, "chat_template": None},
    **{model_type: {"model_type": model_type} for model_type in MODEL_TYPES},
}
OTHERS: dict[str, dict[str, Any]] = {
    "another class": {"tokenizer_class": "LlamaTokenizer"},
    "rebuilt": {"tokenizer_class": "Qwen2Tokenizer", "model_type": "qwen2"},
    "another model": {"model_type": "qwen2"},
    "a token that is not there": {"unk_token": "<unk>"},
    "a special token that is not there": {"extra_special_tokens": ["<|more|>"]},
    "other flags": {"added_tokens_decoder": {"1": {**ADDED["1"], "lstrip": True}}},
    "several templates": {"chat_template": [{"name": "default", "template": "x"}]},
    "unknown": {"image_token": "<|start|>"},
    "split": {"split_special_tokens": True},
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_tokenizer_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, **PLAIN[name])
    found = read_plain(folder)
    assert found is not None
    assert_same(found, auto(folder))
    assert_same(pickle.loads(pickle.dumps(found)), auto(folder))


def test_the_tokenizers_of_the_package_and_of_the_tests_are_plain(tiny_llama: Path) -> None:
    for folder in (resolve("tiny_base"), tiny_llama):
        found = read_plain(folder)
        assert found is not None
        assert_same(found, auto(folder))


@pytest.mark.parametrize("name", OTHERS)
def test_what_transformers_may_change_is_left_to_it(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", **OTHERS[name])
    assert read_plain(folder) is None
    found = read_tokenizer(folder, tmp_path / "cache")
    assert_same(found, auto(folder))
    kept = [json.loads(file.read_bytes()) for file in (tmp_path / "cache").iterdir()]
    assert kept == [found.to_json()]
    assert_same(ModelTokenizer(**kept[0]), auto(folder))


def test_files_that_are_read_beside_tokenizer_json_are_left_to_transformers(tmp_path: Path) -> None:
    for number, (name, text) in enumerate(
        {
            "special_tokens_map.json": '{"unk_token": "<think>"}',
            "added_tokens.json": '{"<|start|>": 2}',
            "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        }.items()
    ):
        folder = make(tmp_path / str(number))
        assert read_plain(folder) is not None
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        assert read_plain(folder) is None
        assert_same(read_tokenizer(folder, None), auto(folder))
    for change in ({"padding": {}}, {"model": {}}):
        file = make(tmp_path / "limits") / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_bytes()), **change}))
        assert read_plain(file.parent) is None


def test_a_kept_tokenizer_is_used_until_a_file_of_the_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = make(tmp_path / "model"), tmp_path / "cache"
    (folder / "model.safetensors").write_bytes(b"1")
    reads: list[Path] = []

    def read(folder: Path) -> ModelTokenizer:
        reads.append(folder)
        return read_by_transformers(folder)

    first = tokenizer_cache.cached(folder, cache, read)
    assert tokenizer_cache.cached(folder, cache, read) == first and len(reads) == 1
    (entry,) = cache.iterdir()
    entry.write_text(entry.read_text()[:100])  # torn
    assert tokenizer_cache.cached(folder, cache, read) == first and len(reads) == 2
    for name in ("chat_template.jinja", "vocab.txt", "additional_chat_templates/a.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("new")
        tokenizer_cache.cached(folder, cache, read)
    assert len(reads) == 5
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "another")
    os.utime(entry, (0, 0))
    tokenizer_cache.cached(folder, cache, read)
    assert len(reads) == 6 and not entry.exists()  # unused for long
    (tmp_path / "file").write_text("")
    assert tokenizer_cache.cached(folder, tmp_path / "file", read) == tokenizer_cache.cached(
        folder, None, read
    )


def test_a_process_without_transformers_stays_without_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", tokenizer_class="LlamaTokenizer")
    script = f"""
import sys
from pathlib import Path
from posttrain_dist.models.folder import load_tokenizer
for model in ({str(folder)!r}, {str(resolve("tiny_base"))!r}):
    tokenizer = load_tokenizer(Path(model), Path({str(tmp_path / "cache")!r}))
    tokenizer.backend_tokenizer.encode("a")
    print(tokenizer.eos_token)
print(sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["<|end|>", "<|end|>", "[]"], done.stderr
    assert len(list((tmp_path / "cache").iterdir())) == 1
