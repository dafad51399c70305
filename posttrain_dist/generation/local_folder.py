"""What local generation needs of a folder: model, tokenizer, tokens that end an answer.

Of an adapter folder, the model is that of its base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from posttrain_dist.data.chat.rendering.answer_reader import Answer, AnswerReader
from posttrain_dist.data.chat.rendering.served import Prompt
from posttrain_dist.errors import DataError, ModelError
from posttrain_dist.files import read_object
from posttrain_dist.generation.base import StopReason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ChatFormat(NamedTuple):
    """How conversations become tokens, and tokens answers."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: list[int]
    reader: AnswerReader

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a conversation, up to where its answer begins.

        Raises:
            DataError: the chat template refuses it.
        """
        try:
            return prompt.encode(self.tokenizer)
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            raise DataError(
                f"the chat template refuses this conversation: {error}",
                where=str(getattr(self.tokenizer, "name_or_path", "")),
                fix="change the order or roles of the messages, or the variables",
            ) from error

    def until_end(self, row: list[int]) -> tuple[list[int], StopReason]:
        """New tokens up to the first that ends an answer, and why they end there."""
        for place, token in enumerate(row):
            if token in self.end_ids:
                return row[: place + 1], StopReason.end_token
        return row, StopReason.length

    def read(self, ids: list[int]) -> Answer:
        """The answer that new tokens are."""
        return self.reader.read(str(self.tokenizer.decode(ids)))


def chat_format(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_token_ids: Sequence[int] = ()
) -> ChatFormat:
    """That of a tokenizer and its template.

    Raises:
        ModelError: nothing names a token that ends an answer.
    """
    ends = end_ids(model, tokenizer, end_token_ids)
    return ChatFormat(tokenizer, ends, AnswerReader(tokenizer))


def choose_tokenizer(
    folders: Sequence[Path], base: Path, *, needs_template: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of the first folder that has one, with a chat template if one is needed.

    Args:
        base: which of them is no adapter.

    Raises:
        ModelError: there is none.
    """
    for folder in folders:
        if folder == base or has_tokenizer(folder):
            tokenizer = load_tokenizer(folder, base)
            if tokenizer.chat_template or not needs_template:
                return tokenizer
    raise ModelError(
        "the tokenizer has no chat template, so no prompt can be made of a conversation",
        where=str(folders[0]),
        fix="give the model that a training with a template made (`posttrain train "
        "template=chatml ...`, then its run folder), or add chat_template.jinja",
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of its own; adapter folders of others may have none."""
    names = ("tokenizer_config.json", "tokenizer.json")
    return any((folder / name).is_file() for name in names)


def load_tokenizer(folder: Path, base: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, whose code is never run.

    Args:
        base: of an adapter folder, which has no config.json.

    Raises:
        ModelError: transformers cannot load it.
    """
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _loading(folder, base or folder):
        if base is not None and base != folder:
            options["config"] = AutoConfig.from_pretrained(base, **options)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    return tokenizer


def load_model(folder: Path, *, nf4: bool = False) -> PreTrainedModel:
    """The causal LM of a folder, in evaluation mode.

    It is on the GPU in its own dtype if there is one, else on the CPU in float32.

    Args:
        folder: of a model; see `adapters.base_of` for what an adapter stands on.
        nf4: store its weights in 4 bits, as they were when an adapter was trained beside them;
            those that are stored so stay so.

    Raises:
        ModelError: transformers cannot load it, or a weight is not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from posttrain_dist.models.finite import refuse_nonfinite

    _refuse_reward_model(folder)
    disable_progress_bar()  # loading bars would stand between a chat's lines
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"dtype": "auto" if device.type == "cuda" else torch.float32}
    nf4 = nf4 or _stored_in_nf4(folder)
    with _loading(folder, folder), contextlib.ExitStack() as stack:
        if nf4:
            options |= _nf4_options(folder, device, stack)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            **options,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,  # the other format is a pickle
        )
    if nf4:
        from posttrain_dist.models.quantized.load_nf4 import prepare_linears

        prepare_linears(model, options["dtype"], folder)  # as they were trained through
    else:
        model = model.to(device)
    refuse_nonfinite(model, folder)
    return model.eval()


def _refuse_reward_model(folder: Path) -> None:
    """transformers would load its layers with a head that nobody trained."""
    from posttrain_dist.models.classifier import check_kind, is_classifier

    try:
        network = read_object(folder / "config.json")
    except (OSError, ValueError):  # loading it says what is wrong
        return
    if is_classifier(network):
        check_kind(network, folder, scalar=False)


def _stored_in_nf4(folder: Path) -> bool:
    from posttrain_dist.models.quantized import holds_nf4

    try:
        return holds_nf4(read_object(folder / "config.json"))
    except (OSError, ValueError, AttributeError):  # loading it says what is wrong
        return False


def _nf4_options(folder: Path, device: Any, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Keywords of `from_pretrained` for a base in NF4, which is made tensor by tensor."""
    import torch
    from transformers import AutoConfig

    from posttrain_dist.models.quantized import holds_nf4
    from posttrain_dist.models.quantized.load_nf4 import (
        nf4_options,
        quantising,
        refuse_unquantisable,
    )

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    stored = holds_nf4(config.to_dict())
    if not stored:
        refuse_unquantisable(config, folder, device)
    stack.enter_context(quantising())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"dtype": dtype, **nf4_options(dtype, device, stored=stored)}


@contextlib.contextmanager
def _loading(folder: Path, model: Path) -> Iterator[None]:
    """Whatever of a folder cannot be loaded, as an error for the user."""
    if not (model / "config.json").is_file():
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
