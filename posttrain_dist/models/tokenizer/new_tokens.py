"""Tokens that a run adds to the tokenizer of its model: `model.add_tokens`.

Each is an ordinary added token (not special, not normalised): it is cut out of a text wherever it
stands, before anything else is, and decoding keeps it. Its id is the next one that is free.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain_dist.errors import CheckpointError, ConfigError
from posttrain_dist.models.tokenizer.model_tokenizer import ModelTokenizer

_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
_KEY = "model.add_tokens"


def with_tokens(tokenizer: ModelTokenizer, tokens: Sequence[str]) -> ModelTokenizer:
    """The tokenizer with more tokens.

    Raises:
        ConfigError: it has one of them already, or is not a fast one.
    """
    if not tokens:
        return tokenizer
    if not tokenizer.is_fast:
        raise ConfigError(
            "needs a fast tokenizer, and the model has none",
            where=_KEY,
            fix="add tokenizer.json: AutoTokenizer.from_pretrained(path).save_pretrained(path)",
        )
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_text)
    there = {token: backend.token_to_id(token) for token in tokens}
    known = [f"{token!r} ({i})" for token, i in there.items() if i is not None]
    if known:
        raise ConfigError(
            f"the tokenizer has {', '.join(known)} already",
            where=_KEY,
            fix="leave out what it has: these are trained as every other token is",
        )
    backend.add_tokens([AddedToken(token, **_FLAGS) for token in tokens])
    return replace(tokenizer, backend_text=backend.to_str())


def new_ids(tokenizer: ModelTokenizer, tokens: Sequence[str]) -> list[int]:
    """Ids of tokens that `with_tokens` added."""
    found = [tokenizer.backend_tokenizer.token_to_id(token) for token in tokens]
    return [i for i in found if i is not None]


def grown_vocab_size(vocab_size: int, ids: Sequence[int]) -> int:
    """Rows of the embeddings: a model may have some that no token used."""
    return max([vocab_size, *(i + 1 for i in ids)])


def write_tokens(folder: Path, tokens: Sequence[str]) -> None:
    """Add tokens to the tokenizer files of a folder, as transformers' `save_pretrained` has them.

    Raises:
        CheckpointError: transformers does not read them back.
        OSError: the disk refused.
    """
    if not tokens:
        return
    from transformers import AutoTokenizer

    def read() -> Any:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    expected = _write_entries(folder, read(), tokens)
    found = [read().convert_tokens_to_ids(token) for token in tokens]
    if found != expected:
        raise CheckpointError(
            f"the new tokens are read back as {found}, and they are {expected}",
            where=str(folder),
            fix="this kind of tokenizer takes no tokens from its files: add them to the model "
            "folder with transformers, then train without model.add_tokens",
        )


def _write_entries(folder: Path, tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Write them; returns the ids, those that `with_tokens` gave."""
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():  # made of other files: transformers writes one
        tokenizer.save_pretrained(folder)
    grown = with_tokens(ModelTokenizer.of(tokenizer), tokens)
    ids = new_ids(grown, tokens)
    values = json.loads(file.read_text(encoding="utf-8"))
    # Also those that the class adds of itself: they come before the new ones.
    values["added_tokens"] = json.loads(grown.backend_text)["added_tokens"]
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if "added_tokens_decoder" in values:  # which then decides
        values["added_tokens_decoder"] |= {
            str(i): {"content": token, **_FLAGS} for i, token in zip(ids, tokens, strict=True)
        }
        settings.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    return ids
