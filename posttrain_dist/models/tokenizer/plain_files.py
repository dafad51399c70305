"""Tokenizers that are what tokenizer.json says, read without transformers.

For a folder whose tokenizer_config.json names the plain class, transformers loads tokenizer.json as
it is, and then may add tokens, set limits or patch patterns for reasons of its own. Here only
folders are read in which nothing gives it a reason: whatever is unknown is left to transformers.
`tests/models/test_tokenizer.py` compares both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.models.tokenizer.model_tokenizer import ModelTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Models for which AutoTokenizer takes the class that tokenizer_config.json names.
MODEL_TYPES = ("gemma2", "granite", "llama", "olmo2", "qwen3", "smollm3")
_NAMED = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
    "mask_token",
)
_LISTS = ("extra_special_tokens", "additional_special_tokens")
# Settings that change no token of a text: transformers itself drops add_*_token beside
# tokenizer.json.
_WITHOUT_EFFECT = {
    *("tokenizer_class", "backend", "is_local", "local_files_only", "name_or_path"),
    *("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "model_input_names"),
    *("model_max_length", "padding_side", "truncation_side", "processor_class"),
    *("chat_template", "response_template", "response_schema"),
}
_KNOWN = {*_NAMED, *_LISTS, *_WITHOUT_EFFECT, "added_tokens_decoder"}


def read_plain(folder: Path) -> ModelTokenizer | None:
    """The tokenizer of a model folder; null where transformers may make another one of its files.

    Never an error: transformers, which is asked next, says what is wrong.
    """
    try:
        config = _read(folder / "tokenizer_config.json")
        if _is_plain(folder, config):
            return _make(folder, config)
    except Exception:  # tokenizers raise bare Exception on a damaged file
        pass
    return None


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _is_plain(folder: Path, config: dict[str, Any]) -> bool:
    others = ["added_tokens.json", "additional_chat_templates"]
    if "added_tokens_decoder" not in config:  # else it has no say
        others.append("special_tokens_map.json")
    return (
        config.get("tokenizer_class") in _CLASSES
        and config.keys() <= _KNOWN
        and isinstance(config.get("chat_template"), str | None)
        and _read(folder / "config.json").get("model_type") in MODEL_TYPES
        and not any((folder / name).exists() for name in others)
    )


def _make(folder: Path, config: dict[str, Any]) -> ModelTokenizer | None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    backend = Tokenizer.from_str(text)
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    named = {name: _content(config[name]) for name in _NAMED if config.get(name) is not None}
    others: Any = next((config[name] for name in _LISTS if config.get(name)), [])
    special = list(dict.fromkeys([*named.values(), *others]))
    if backend.truncation or backend.padding or not _are_strings(special):
        return None
    if not all(name in added for name in special) or not _has_same_flags(backend, config):
        return None  # it would add tokens
    if backend.post_processor is None:  # it puts one there that does nothing
        pair = "$A:0 $B:1"
        backend.post_processor = TemplateProcessing(single="$A:0", pair=pair, special_tokens=[])
        text = backend.to_str()
    made = ModelTokenizer(
        backend_text=text,
        special_tokens_map=named,
        all_special_tokens=special,
        special_ids={name: added[name] for name in special},
        chat_template=_chat_template(folder, config),
    )
    made.__dict__["backend_tokenizer"] = backend  # not a second time
    return made


def _content(token: Any) -> Any:
    """A token's text; it may be an object with flags, which tokenizer.json has too."""
    return token["content"] if isinstance(token, dict) and "__type" in token else token


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _has_same_flags(backend: Tokenizer, config: dict[str, Any]) -> bool:
    """Whether the added tokens that tokenizer_config.json describes are those of tokenizer.json."""
    from tokenizers import AddedToken

    own = backend.get_added_tokens_decoder()
    described = config.get("added_tokens_decoder", {})
    return all(repr(AddedToken(**flags)) == repr(own.get(int(i))) for i, flags in described.items())


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():  # read as transformers does: line breaks become LF
        with file.open(encoding="utf-8") as stream:
            return stream.read()
    template: str | None = config.get("chat_template")
    return template
