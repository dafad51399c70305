"""What local generation needs of a folder: model, tokenizer, tokens that end an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from posttrain_dist.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, whose code is never run.

    Raises:
        ModelError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    with _loading(folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    return tokenizer


def load_model(folder: Path) -> PreTrainedModel:
    """The causal LM of a folder, in evaluation mode.

    It is on the GPU in its own dtype if there is one, else on the CPU in float32.

    Raises:
        ModelError: transformers cannot load it, or a weight is not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from posttrain_dist.models.finite import refuse_nonfinite

    disable_progress_bar()  # loading bars would stand between a chat's lines
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _loading(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if device.type == "cuda" else torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,  # the other format is a pickle
        )
    model = model.to(device).eval()
    refuse_nonfinite(model, folder)
    return model


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Whatever of a folder cannot be loaded, as an error for the user."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            "holds no model (there is no config.json)",
            where=str(folder),
            fix="give a Hugging Face folder; `posttrain export RUN` writes that of a run",
        )
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot be loaded: {error}",
            where=str(folder),
            fix="check that the folder has config.json, *.safetensors and a tokenizer",
        ) from error


def end_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, more: Sequence[int]
) -> list[int]:
    """Ids that end an answer: the model's own, the tokenizer's, the template's end of turn, `more`.

    A base model's tokenizer often ends texts with one token and turns with another.

    Raises:
        ModelError: there is none.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [*more, *([] if own is None else [own] if isinstance(own, int) else own)]
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        found += _end_of_turn(tokenizer)
    if not found:
        raise ModelError(
            "neither the model, the tokenizer nor its chat template names an end-of-turn token",
            where=str(getattr(tokenizer, "name_or_path", "")),
            fix="set eos_token in tokenizer_config.json",
        )
    return sorted(set(found))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The added token that the chat template writes behind an answer, if it does."""
    marker = "posttrain-answer"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
    try:
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError, TypeError, LookupError):  # it refuses such turns
        return []
    tail = rendered.rpartition(marker)[2]
    after: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return after[:1] if after and after[0] in tokenizer.added_tokens_decoder else []
