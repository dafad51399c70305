"""A tokenizer by transformers, in a process that has no torch: 2 s where importing both takes 7."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from posttrain_dist.models.tokenizer.model_tokenizer import ModelTokenizer

# transformers reads tokenizers without torch too, and then leaves out whatever needs it.
_SCRIPT = """
import sys
sys.modules["torch"] = None
from posttrain_dist.models.tokenizer.transformers_child import print_tokenizer
print_tokenizer(sys.argv[1])
"""


def read_by_transformers(folder: Path) -> ModelTokenizer:
    """The tokenizer as AutoTokenizer reads it from the folder, from its files alone.

    Raises:
        Exception: whatever transformers raises.
    """
    if "transformers.tokenization_utils_base" not in sys.modules:
        command = [sys.executable, "-P", "-c", _SCRIPT, str(folder)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == 0:
            return ModelTokenizer(**json.loads(done.stdout.splitlines()[-1]))
    return ModelTokenizer.of(_load(folder))  # ... or raises in this process what went wrong


def print_tokenizer(folder: str) -> None:
    """Write the tokenizer to stdout, as JSON in one line."""
    print(json.dumps(ModelTokenizer.of(_load(Path(folder))).to_json()))


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
