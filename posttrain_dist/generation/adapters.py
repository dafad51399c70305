"""Adapters on one loaded base model, of which one or none is active at a time.

LoRA, IA3 and what else `peft` inserts into the layers are one PeftModel; prompts and prefixes stand
before a row and leave the layers alone, so that each has a PeftModel of its own. What `peft` does
not know comes by a function that is handed over, and is switched by its tensors.
"""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.generation.adapter_places import (
    BASE,
    CONFIG,
    WEIGHTS,
    check_name,
    read_config,
    refuse_nonfinite,
    shapes_of,
    tensors_of,
)
from posttrain_dist.generation.vocabulary_rows import last_trained_token, table_sizes

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


# Inserts the modules of an adapter folder that `peft` does not know, if they are not there yet;
# returns the folder's tensors by their names in the model.
Attach = Callable[["nn.Module", Path], Mapping[str, "torch.Tensor"]]

# Initialisations of LoRA that change the base model's own weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE")


def _inner(name: str) -> str:
    """The name inside `peft`, which looks for it in the names of tensors."""
    return f"posttrain_{name}_"


class AdapterSet:
    """Adapters by name on one loaded model.

    Args:
        model: the base, in evaluation mode; it may get modules inserted.
        attach: loads what `peft` does not know; None: such folders are refused.
    """

    def __init__(self, model: PreTrainedModel, attach: Attach | None = None) -> None:
        self._model: Any = model
        names = {module: name for name, module in model.named_modules()}
        self._tables = names[model.get_input_embeddings()], names.get(model.get_output_embeddings())
        self._base_names = {name for name, _ in model.named_parameters()}
        self._vocab_size = int(model.config.get_text_config().vocab_size)  # before tokens came
        self._attach = attach
        self._folders: dict[str, Path] = {}
        self._tuned: Any = None  # the PeftModel of all adapters that stand in the layers
        self._tuned_names: list[str] = []
        self._changes_base = False
        self._prompts: dict[str, Any] = {}  # a PeftModel each
        self._own: dict[str, dict[str, torch.Tensor]] = {}  # tensors by parameter
        self._off: dict[str, torch.Tensor] = {}  # of these parameters while no own one is active

    @property
    def names(self) -> list[str]:
        """Of all adapters, in the order in which they came."""
        return list(self._folders)

    def add(self, name: str, folder: Path) -> None:
        """Load an adapter folder beside those that are there.

        Raises:
            ConfigError: the name is taken, or none that an adapter can have.
            ModelError: the folder cannot be loaded onto this model.
        """
        check_name(name, self.names, folder)
        config = read_config(folder)
        method = config.get("peft_type")
        if method is None:
            self._add_own(name, folder)
            self._folders[name] = folder
            return
        if config.get("megatron_config"):
            what = "names a Python module that loading it would run"
            raise ModelError(what, where=str(folder / CONFIG), fix="do not use this folder")
        if not (folder / WEIGHTS).is_file():
            raise ModelError(
                f"has no {WEIGHTS}; no other format is read (a pickle can run code)",
                where=str(folder),
                fix="save the adapter again with a present version of peft",
            )
        with self._loading(folder):
            self._grow(config, folder)
            refuse_nonfinite(tensors_of(folder), folder)
            if method in _PROMPTS:
                self._prompts[name] = self._wrapped(name, folder)
            else:
                self._add_tuned(name, folder, config)
        if method in _PROMPTS:  # peft makes those behind the virtual tokens itself
            warnings.filterwarnings("ignore", "Position ids are not supported")
        self._folders[name] = folder

    def _add_tuned(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        method = str(config["peft_type"])
        changes_base = self._writes_base(config, folder)
        others = set() if self._tuned is None else {c.peft_type.value for c in self._configs()}
        if self._changes_base or (changes_base and others):
            raise ModelError(
                "an adapter that begins with the base model's own weights, or holds some in place "
                "of them, changes them, so no other one can stand beside it",
                where=str(folder),
                fix="load it by itself; one that begins with them can be converted to a plain "
                "LoRA: `posttrain export RUN OUT --plain`",
            )
        if others - {method}:
            raise ModelError(
                f"an adapter of {method} and one of {min(others)} cannot share a loaded model",
                where=str(folder),
                fix="load adapters of one method together",
            )
        if self._tuned is None:
            self._tuned = self._wrapped(name, folder)
        # Of the first one once more: making the model of it does not say what was left over.
        device = str(self._model.device)
        with self._token_rows_apart(config):
            loaded = self._tuned.load_adapter(str(folder), _inner(name), torch_device=device)
        if loaded.missing_keys:
            raise ValueError(f"tensors are missing, first of them {loaded.missing_keys[0]}")
        there = shapes_of(folder)
        # peft writes the tables of tokens twice if they have grown.
        unread = {left.replace(".modules_to_save", ""): left for left in loaded.unexpected_keys}
        if left := [name for short, name in unread.items() if short == name or short not in there]:
            raise ValueError(
                f"{len(left)} tensors of the file have no place there by {CONFIG}, first of them "
                f"{left[0].replace(f'.{_inner(name)}', '')}"
            )
        self._tuned_names.append(name)
        self._changes_base = changes_base

    @contextlib.contextmanager
    def _token_rows_apart(self, config: Mapping[str, Any]) -> Iterator[None]:
        """Where peft would look for rows of tokens that an adapter before has, and this one not."""
        from peft.utils.other import TrainableTokensWrapper

        apart = []
        if not config.get("trainable_token_indices"):
            apart = [m for m in self._tuned.modules() if isinstance(m, TrainableTokensWrapper)]
        for module in apart:
            module.adapter_state_dict_load_map = lambda name: {}
        try:
            yield
        finally:
            for module in apart:
                del module.adapter_state_dict_load_map

    def _writes_base(self, config: Mapping[str, Any], folder: Path) -> bool:
        """Whether loading an adapter changes the base's own weights, biases or tables of tokens."""
        init = config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
            return True
        beside = tuple(config.get("modules_to_save") or ())  # these are copied
        for name in shapes_of(folder):
            own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if own in self._base_names and not own.rpartition(".")[0].endswith(beside):
                return True
        return False

    def _grow(self, config: Mapping[str, Any], folder: Path) -> None:
        """Rows for the tokens that an adapter adds; what they hold is in the adapter."""
        from posttrain_dist.models.embeddings.added_tokens import add_rows

        size = int(self._model.config.get_text_config().vocab_size)
        sizes = table_sizes(shapes_of(folder), *self._tables)
        needed = max(last_trained_token(config) + 1, *sizes.values(), size)
        smaller = [module for module, rows in sizes.items() if rows < size]
        if smaller and size > self._vocab_size:
            what = f"has {smaller[0]} of {sizes[smaller[0]]} tokens, and an adapter before added "
            raise ModelError(what + "some", where=str(folder), fix="load it by itself")
        if needed == size:
            return
        tables = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        if any(
            hasattr(table, "base_layer") or hasattr(table, "original_module") for table in tables
        ):
            raise ModelError(
                f"adds tokens, up to {needed - 1}, and an adapter before stands in the embeddings "
                "or the head",
                where=str(folder),
                fix="load it first, or by itself",
            )
        add_rows(self._model, range(size, needed))

    def _configs(self) -> list[Any]:
        return list(self._tuned.peft_config.values())

    def _wrapped(self, name: str, folder: Path) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(
            self._model,
            str(folder),
            adapter_name=_inner(name),
            is_trainable=False,
            torch_device=str(self._model.device),
        ).eval()

    def _add_own(self, name: str, folder: Path) -> None:
        if self._attach is None:
            raise ModelError(
                "is of a method that peft does not know",
                where=str(folder / CONFIG),
                fix="load it by `posttrain chat` or `posttrain evaluate`",
            )
        tensors = dict(self._attach(self._model, folder))
        parameters = dict(self._model.named_parameters())
        for key, tensor in tensors.items():
            if parameters[key].shape != tensor.shape or (self._off and key not in self._off):
                raise ModelError(
                    f"{key} is of another size or place than in the adapters before",
                    where=str(folder),
                    fix="load adapters of one method and of equal sizes together",
                )
        self._off = self._off or {key: parameters[key].detach().clone() for key in tensors}
        refuse_nonfinite(tensors.items(), folder)
        self._own[name] = tensors

    @contextlib.contextmanager
    def _loading(self, folder: Path) -> Iterator[None]:
        """Whatever of a folder `peft` cannot load, or would load in part, as one error."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*missing adapter keys")
                yield
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, UserWarning) as error:
            said, *each = str(error).split("\n\t")  # torch lists all that differ
            if each:
                said = f"{len(each)} faults, first of them: {each[0]}"
            raise ModelError(
                f"cannot be loaded onto {self._model.name_or_path}: {said}",
                where=str(folder),
                fix=f"is it an adapter of this base model, and {CONFIG} as it was written?",
            ) from error

    @contextlib.contextmanager
    def active(self, name: str) -> Iterator[Any]:
        """With one adapter, or none for the name `none`: what generates and gives logits.

        Raises:
            ConfigError: there is no adapter of this name.
            ModelError: the base model itself is no longer there.
        """
        self.check(name)
        with contextlib.ExitStack() as stack:
            if name in self._tuned_names:
                self._tuned.set_adapter(_inner(name), inference_mode=True)
                yield self._tuned
                return
            if self._tuned is not None:
                stack.enter_context(self._tuned.disable_adapter())
            if name in self._own:
                stack.callback(self._write, self._off)
                self._write(self._own[name])
            yield self._prompts.get(name, self._model)

    def check(self, name: str) -> None:
        """Whether an adapter can be asked for; the errors of `active`."""
        if name != BASE and name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=1)
            there = ", ".join([*self.names, BASE])
            raise ConfigError(
                "there is no adapter of this name",
                where=name,
                fix=f"did you mean {near[0]}?" if near else f"use one of: {there}",
            )
        if self._changes_base and name not in self._tuned_names:
            raise ModelError(
                f"the adapter {self._tuned_names[0]} has changed the base model's weights",
                where=name,
                fix="load the base model by itself",
            )

    def virtual_tokens(self, name: str) -> int:
        """How many positions of a row an adapter takes."""
        prompt = self._prompts.get(name)
        return 0 if prompt is None else int(prompt.active_peft_config.num_virtual_tokens)

    def _write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        import torch

        parameters = dict(self._model.named_parameters())
        with torch.no_grad():
            for key, tensor in tensors.items():
                parameters[key].copy_(tensor)
