"""Which files of a model folder go into its export beside the weights and config.json.

The tokenizer's, whatever its class calls them, those of generation, and the licence. Never weights,
states of an optimizer, descriptions or Python code; folders and what is too large are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from posttrain_dist.errors import reason

# Patterns of names, in small letters.
CARRIED = (
    *("tokenizer.json", "tokenizer.*.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "vocab-*.json", "*_vocab.json", "merges.txt", "bpe.codes"),
    *("dict.txt", "emoji.json", "normalizer.json", "byte_maps.json", "word_*.json"),
    *("*.model", "*.model.v*", "*.spm", "*.tiktoken", "*.tokenizer", "tekken.json"),
    *("license*", "licence*", "notice*", "use_policy*"),
)
TEMPLATE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
_NEVER = (".py", ".safetensors", ".bin", ".pt", ".pth", ".gguf")
MAX_BYTES = 256 << 20  # the largest tokenizers have some 40 MiB

Notice = Callable[[str], None]


def carry_files(source: Path, target: Path, *, templates: bool, notice: Notice) -> None:
    """Copy what a model needs beside its weights.

    Args:
        source: a model folder.
        target: the new one, which is there.
        templates: also the chat templates; else those of `tokenizer_config.json` are left out.
        notice: called with one line for each file that should be carried and cannot be.

    Raises:
        OSError: the disk refused to take a file.
    """
    files = [path for path in sorted(source.iterdir()) if _is_carried(path, templates)]
    if templates and (source / TEMPLATE_FOLDER).is_dir():
        files += sorted((source / TEMPLATE_FOLDER).glob("*.jinja"))
    for path in files:
        try:
            if path.stat().st_size > MAX_BYTES:
                notice(f"{path} is not carried into the export: it is larger than a tokenizer")
                continue
            content = path.read_bytes()
        except OSError as error:
            notice(f"{path} is not carried into the export: {reason(error)}")
            continue
        if path.name == "tokenizer_config.json":
            content = _without_code(content, templates)
        written = target / path.relative_to(source)
        written.parent.mkdir(exist_ok=True)
        written.write_bytes(content)


def _is_carried(path: Path, templates: bool) -> bool:
    name = path.name.lower()
    wanted = any(fnmatch(name, pattern) for pattern in CARRIED)
    wanted = wanted or (templates and path.name in (TEMPLATE, "chat_template.json"))
    return wanted and not name.endswith(_NEVER) and path.is_file()


def _without_code(content: bytes, templates: bool) -> bytes:
    """tokenizer_config.json without the names of code files, and of templates that are not kept."""
    try:
        values: dict[str, Any] = json.loads(content)
        left_out = {"auto_map"} | (set() if templates else {"chat_template"})
        if left_out.isdisjoint(values):
            return content
    except (ValueError, TypeError):  # whoever reads the tokenizer says so
        return content
    kept = {key: value for key, value in values.items() if key not in left_out}
    return json.dumps(kept, indent=2, ensure_ascii=False).encode()
