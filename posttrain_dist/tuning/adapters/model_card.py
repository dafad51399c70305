"""The model card (README.md) of an adapter and of a merged model: what it is, and who can load it.

What an engine cannot load is said here, where the one who serves the model looks, with the command
that makes a form of it that loads everywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain_dist.tuning.saved_adapter import SavedAdapter

_MERGE = "`posttrain export RUN OUT --merge` makes a plain model of base and adapter"
_PLAIN = "`posttrain export RUN OUT --plain`"
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that `--max-lora-rank` takes
_VIRTUAL = {
    "PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "P-tuning",
    "PREFIX_TUNING": "prefix tuning",
}


def adapter_card(
    saved: SavedAdapter,
    base: Path,
    *,
    method: str,
    tuning: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    channels: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> str:
    """README.md of an adapter folder.

    Args:
        method: option of the group `tuning`.
        tuning: the values of the group.
        vocab_size: rows of the embeddings, where they grew for new tokens; None: as in the base.
        channels: of the data that it was trained on.
        facts: more rows of the table: label -> value.
    """
    config, tuning = saved.config, tuning or {}
    is_peft = "peft_type" in config
    rows = {
        "method": _method(config, method, tuning),
        "base model": f"`{base}`",
        "parameters": f"{sum(tensor.numel() for tensor in saved.tensors.values()):,}",
    }
    if scale := effective_scale(config):
        rows["effective scale"] = scale
    if channels:
        rows["data channels"] = ", ".join(channels)
    rows |= facts or {}
    head = {"base_model": str(base), "library_name": "peft" if is_peft else "adapters"}
    return "\n".join(
        [
            *_front_matter({**head, "tags": ["posttrain-dist", method]}),
            f"# Adapter of {base.name}",
            "",
            *_table(rows),
            "",
            "## Load it",
            "",
            "```python",
            *_code(config, base, vocab_size),
            "```",
            "",
            "The tokenizer and the chat template of the training stand in this folder: use them, "
            "not those of the base.",
            "",
            "## Which engines can load it",
            "",
            *(f"- {line}" for line in engine_lines(saved, tuning)),
            "",
        ]
    )


_PEFT_LINES = """\
from peft import PeftModel; from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, "<this folder>")"""

_REWARD_LINES = """\
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base = AutoModelForSequenceClassification.from_pretrained({base}, num_labels=1, dtype="auto")
base.config.pad_token_id = AutoTokenizer.from_pretrained("<this folder>").pad_token_id
model = PeftModel.from_pretrained(base, "<this folder>")"""

_ADAPTERS_LINES = """\
import adapters; from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({base}); adapters.init(model)
model.set_active_adapters(model.load_adapter("<this folder>", use_safetensors=True))"""


_OUR_LINES = """\
from pathlib import Path; from posttrain_dist.evaluation.chat_generator import load_generator
generator = load_generator(Path("<this folder>"))"""


def _code(config: Mapping[str, Any], base: Path, vocab_size: int | None) -> list[str]:
    """The lines of Python that load the adapter."""
    template = _PEFT_LINES if "peft_type" in config else _ADAPTERS_LINES
    own = config.get("config")
    if isinstance(own, Mapping) and own.get("architecture"):  # which that library has not
        template = _OUR_LINES
    if config.get("task_type") == "SEQ_CLS":
        template = _REWARD_LINES
    lines = template.format(base=repr(str(base))).splitlines()
    if vocab_size is not None:
        grow = f"base.resize_token_embeddings({vocab_size}, mean_resizing=False)"
        after = next(i for i, line in enumerate(lines) if line.startswith("base = "))
        lines.insert(after + 1, f"{grow}  # the rows of new tokens are the adapter's")
    return lines


def ensemble_card(num_prompts: int, base: Path) -> str:
    """README.md of a folder that holds the prompts of an ensemble."""
    return "\n".join(
        [
            *_front_matter({"base_model": str(base), "library_name": "peft"}),
            f"# {num_prompts} soft prompts of {base.name}, trained side by side for one task",
            "",
            f"`prompt-0` to `prompt-{num_prompts - 1}` are adapter folders: plain `peft` loads "
            "each. `posttrain evaluate` scores each of them, their vote and their average.",
            "",
        ]
    )


def merged_card(
    base: Path,
    *,
    method: str,
    channels: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """README.md of a model that an adapter was merged into.

    Args:
        facts: more rows of the table: label -> value, such as both measured losses.
        notes: paragraphs below it.
    """
    rows = {"made of": f"`{base}`", "by": method}
    if channels:
        rows["data channels"] = ", ".join(channels)
    rows |= facts or {}
    return "\n".join(
        [
            *_front_matter({"base_model": str(base), "library_name": "transformers"}),
            f"# {base.name}, with its adapter merged in",
            "",
            *_table(rows),
            "",
            "It is a plain model of its architecture: whatever loads the base loads it.",
            *(line for note in notes for line in ("", note)),
            "",
        ]
    )


def engine_lines(saved: SavedAdapter, tuning: Mapping[str, Any]) -> list[str]:
    """Who can load an adapter, who cannot and why, and what to do then; one line each."""
    lines = _loading_lines(saved, tuning)
    if tuning.get("quantize", "none") != "none":
        lines.append(
            f"it was trained beside the base in {str(tuning['quantize']).upper()}: on the 16-bit "
            "base it answers slightly otherwise; `posttrain export RUN OUT --merge` measures both"
        )
    if saved.config.get("use_dora"):
        lines.append(
            "plain `peft` computes DoRA wrongly on a base in NF4 on some CPUs, where bitsandbytes "
            "repacks weights whose norm is then read: merge it there, or use `posttrain chat`"
        )
    return lines


def _loading_lines(saved: SavedAdapter, tuning: Mapping[str, Any]) -> list[str]:
    config = saved.config
    kind = config.get("peft_type")
    if kind is None:
        own = config.get("config")
        only = isinstance(own, Mapping) and own.get("architecture")
        library = ", and the `adapters` library with a version of transformers that it takes"
        return [
            f"this project{'' if only else library}",
            "neither `peft` nor vLLM, SGLang or llama.cpp; it cannot be merged: there is a "
            "non-linearity between its matrices",
        ]
    if kind in _VIRTUAL:
        return [
            "this project, and plain `peft`",
            f"neither vLLM, SGLang nor llama.cpp: they have no {_VIRTUAL[kind]}; it cannot be "
            "merged: virtual tokens are no weights of the model",
        ]
    if kind != "LORA":
        return ["this project, and plain `peft`", f"no server of LoRA adapters: {_MERGE}"]
    return ["this project, and plain `peft`", *_lora_lines(saved, tuning)]


def _lora_lines(saved: SavedAdapter, tuning: Mapping[str, Any]) -> list[str]:
    config, lines = saved.config, []
    refused = [
        name
        for name, there in {
            "DoRA": config.get("use_dora"),
            "`modules_to_save`": config.get("modules_to_save"),
            "trained tokens": config.get("trainable_token_indices"),
        }.items()
        if there
    ]
    if refused:
        lines.append(f"not vLLM: it refuses {' and '.join(refused)}. {_MERGE}")
    else:
        lines.append(_vllm_line(int(config.get("r", 0))))
    if config.get("trainable_token_indices"):
        lines.append(f"the vocabulary has grown: a server needs the merged model. {_MERGE}")
    if _is_pissa(tuning):
        lines.append(
            "PiSSA's own part of the base weights is subtracted in it: it is plain LoRA of twice "
            f"the trained rank ({config.get('r')}), on the base as it is"
        )
    if config.get("use_rslora"):
        lines.append(
            "rsLoRA scales by alpha / sqrt(rank); an engine that reads alpha / rank alone (SGLang, "
            f"llama.cpp) scales wrongly without an error. {_PLAIN} folds the scale into alpha"
        )
    if any("lora_embedding" in name or "lm_head" in name for name in saved.tensors):
        lines.append(
            f"it adapts the head or the embeddings, which many servers leave out. {_MERGE}"
        )
    return lines


def _vllm_line(rank: int) -> str:
    room = next((limit for limit in _VLLM_RANKS if limit >= rank), None)
    if room is None:
        return f"not vLLM: it takes ranks up to {_VLLM_RANKS[-1]}, and this is {rank}. {_MERGE}"
    return f"vLLM, with `--enable-lora --max-lora-rank {room}`"


def _is_pissa(tuning: Mapping[str, Any]) -> bool:
    return tuning.get("init") == "pissa"


def effective_scale(config: Mapping[str, Any]) -> str:
    """What LoRA's B A is multiplied by, and how it comes about; "" of another method."""
    if config.get("peft_type") != "LORA" or not config.get("r"):
        return ""
    rank, alpha = config["r"], config.get("lora_alpha", config["r"])
    if config.get("use_rslora"):
        return f"{alpha / math.sqrt(rank):.4g} (alpha {alpha:g} / sqrt(rank {rank}))"
    return f"{alpha / rank:.4g} (alpha {alpha:g} / rank {rank})"


def _method(config: Mapping[str, Any], method: str, tuning: Mapping[str, Any]) -> str:
    """The method by its name, with what it is a variant of."""
    variants = {
        "DoRA": config.get("use_dora"),
        "rsLoRA": config.get("use_rslora"),
        "PiSSA": _is_pissa(tuning),
        "NF4 base": tuning.get("quantize", "none") != "none",
    }
    named = [name for name, there in variants.items() if there]
    return f"{method} ({', '.join(named)})" if named else method


def _table(rows: Mapping[str, str]) -> list[str]:
    lines = [f"| {label} | {value} |" for label, value in rows.items()]
    return ["| | |", "|---|---|", *lines]


def _front_matter(values: Mapping[str, Any]) -> list[str]:
    """Values for the hub, as YAML; JSON is YAML."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return ["---", *lines, "---", ""]
