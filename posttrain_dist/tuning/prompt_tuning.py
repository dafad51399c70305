"""Prompt tuning (Lester et al., arXiv:2104.08691) and P-tuning (Liu et al., arXiv:2103.10385).

Trained vectors that stand before every sample of a packed row. `peft` has one prompt for each ROW,
which of a packed one the first sample alone would see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain_dist.errors import ModelError, Rule, at_least
from posttrain_dist.tuning.saved_adapter import ENSEMBLE, SavedAdapter
from posttrain_dist.tuning.virtual import (
    EMBEDDINGS,
    VirtualTuning,
    embed_words,
    embedding_width,
    insert_virtual_tokens,
    new_embedding,
    peft_config,
    prepend,
    rows_of,
    saved_embeddings,
    text_ids,
    text_rule,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from posttrain_dist.flow import Batch


@dataclass(kw_only=True, slots=True)
class Prompt(VirtualTuning):
    """`tokens` trained embeddings before every sample."""

    # Text whose tokens' embeddings the prompt begins with; null: those of random words. The other
    # prompts of an ensemble begin with random words, or they would all stay the same.
    init_text: str | None = None
    # Prompts that are trained side by side for one task, in one pass over the base model.
    ensemble: int = 1

    default_lr: ClassVar[float] = 0.2
    marks: ClassVar[tuple[str, ...]] = ("prompt",)

    def rules(self) -> list[Rule]:
        """Ranges."""
        return [
            *VirtualTuning.rules(self),
            at_least("tuning.ensemble", self.ensemble, 1, 10**4),
            text_rule(self.init_text),
        ]

    @property
    def copies(self) -> int:
        """Each prompt sees every row."""
        return self.ensemble

    def check_network(self, network: Mapping[str, Any]) -> None:
        """Refuse layers that look up embeddings of their own."""
        _refuse_layer_inputs(network)

    def insert(self, model: nn.Module) -> None:
        """A table of embeddings, `prompt`: those of prompt 0, then of prompt 1, ..."""
        import torch

        self.check_network(model.config.to_dict())  # type: ignore[union-attr, operator]
        words: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
        ids = torch.randint(words, (self.ensemble * self.tokens,)).tolist()
        if self.init_text is not None:
            ids[: self.tokens] = text_ids(model, self.init_text, self.tokens)
        model.prompt = new_embedding(model, embed_words(model, ids))

    def extend(self, batch: Batch) -> Batch:
        """Places before every sample, once for each prompt of the ensemble."""
        return insert_virtual_tokens(batch, self.tokens, self.ensemble)

    def embed(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The prompt in its places."""
        return prepend(model, rows_of(model.prompt), self.tokens, batch)

    def to_adapter(
        self, kept: Mapping[str, torch.Tensor], network: Mapping[str, Any]
    ) -> SavedAdapter:
        """As `peft` saves a prompt; that of an ensemble is for `split_ensemble`."""
        tensor = kept["prompt.weight"]
        text = {} if self.init_text is None else {"prompt_tuning_init_text": self.init_text}
        config = peft_config(
            "PROMPT_TUNING",
            network,
            self.tokens,
            token_dim=tensor.shape[1],
            prompt_tuning_init="RANDOM",  # "TEXT" would make peft look for a tokenizer
            **text,
        )
        if self.ensemble > 1:
            config[ENSEMBLE] = self.ensemble
        return SavedAdapter(config, {EMBEDDINGS: tensor})

    def from_adapter(
        self, saved: SavedAdapter, network: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """A prompt, an ensemble of as many, or the embeddings that P-tuning has made."""
        count = saved.config.get(ENSEMBLE, 1)
        if count != self.ensemble:
            raise ModelError(
                f"holds {count} prompts, and tuning.ensemble is {self.ensemble}",
                where="tuning.init_from",
                fix=f"set tuning.ensemble={count}",
            )
        saved_width = saved.config.get("token_dim")
        shape = (self.ensemble * self.tokens, int(saved_width or network["hidden_size"]))
        return {"prompt.weight": saved_embeddings(saved, ("PROMPT_TUNING", "P_TUNING"), shape)}


def split_ensemble(saved: SavedAdapter) -> list[SavedAdapter]:
    """Each prompt of an ensemble as an adapter that `peft` loads; of any other, itself."""
    count = saved.config.get(ENSEMBLE, 1)
    config = {key: value for key, value in saved.config.items() if key != ENSEMBLE}
    parts = saved.tensors[EMBEDDINGS].chunk(count) if count > 1 else [saved.tensors[EMBEDDINGS]]
    return [SavedAdapter(config, {EMBEDDINGS: part.clone()}) for part in parts]


def join_ensemble(parts: Sequence[SavedAdapter]) -> SavedAdapter:
    """The inverse of `split_ensemble`."""
    import torch

    if len(parts) == 1:
        return parts[0]
    tensor = torch.cat([part.tensors[EMBEDDINGS] for part in parts])
    return SavedAdapter({**parts[0].config, ENSEMBLE: len(parts)}, {EMBEDDINGS: tensor})


@dataclass(kw_only=True, slots=True)
class PTuning(VirtualTuning):
    """`tokens` embeddings that a small trained MLP makes, before every sample."""

    hidden_size: int | None = None  # of the MLP; null: that of the model's embedding
    layers: int = 2  # hidden ones of the MLP

    default_lr: ClassVar[float] = 1e-2
    marks: ClassVar[tuple[str, ...]] = ("prompt_encoder",)

    def rules(self) -> list[Rule]:
        """Ranges."""
        return [
            *VirtualTuning.rules(self),
            at_least("tuning.hidden_size", self.hidden_size, 1, 10**7),
            at_least("tuning.layers", self.layers, 1, 10**3),
        ]

    def decays(self, name: str, shape: Sequence[int]) -> bool:
        """Of the MLP its matrices; its input, the table of embeddings, never."""
        return len(shape) >= 2 and ".embedding." not in name

    def check_network(self, network: Mapping[str, Any]) -> None:
        """Refuse layers that look up embeddings of their own."""
        _refuse_layer_inputs(network)

    def insert(self, model: nn.Module) -> None:
        """`prompt_encoder` as in `peft`: a table of embeddings, then linear layers and ReLUs."""
        from torch import nn

        self.check_network(model.config.to_dict())  # type: ignore[union-attr, operator]
        dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        width = embedding_width(model)
        sizes = [width, *[self.hidden_size or width] * self.layers, width]
        mlp: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            mlp += [nn.ReLU()] * (i > 0) + [nn.Linear(before, after)]
        parts = {"embedding": nn.Embedding(self.tokens, width), "mlp_head": nn.Sequential(*mlp)}
        model.prompt_encoder = nn.ModuleDict(parts).to(dtype=dtype)

    def extend(self, batch: Batch) -> Batch:
        """Places before every sample."""
        return insert_virtual_tokens(batch, self.tokens)

    def embed(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What the MLP makes, in its places."""
        encoder: Any = model.prompt_encoder
        prompt_PD = encoder["mlp_head"](rows_of(encoder["embedding"]))
        return prepend(model, prompt_PD, self.tokens, batch)

    def to_adapter(
        self, kept: Mapping[str, torch.Tensor], network: Mapping[str, Any]
    ) -> SavedAdapter:
        """As `peft` saves it: what the MLP makes, without the MLP."""
        import torch
        from torch import nn

        hidden = kept["prompt_encoder.embedding.weight"].float()
        for i in range(self.layers + 1):
            name = f"prompt_encoder.mlp_head.{2 * i}"
            hidden = torch.relu(hidden) if i else hidden
            bias = kept[f"{name}.bias"].float()
            hidden = nn.functional.linear(hidden, kept[f"{name}.weight"].float(), bias)
        config = peft_config(
            "P_TUNING",
            network,
            self.tokens,
            token_dim=hidden.shape[1],
            encoder_reparameterization_type="MLP",
            encoder_hidden_size=self.hidden_size or hidden.shape[1],
        )
        return SavedAdapter(config, {EMBEDDINGS: hidden})

    def from_adapter(
        self, saved: SavedAdapter, network: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Refused: the MLP is not in the file."""
        raise ModelError(
            "a P-tuning adapter holds what its MLP makes, not the MLP, which so cannot go on",
            where="tuning.init_from",
            fix="continue with tuning=prompt tuning.init_from=<the same folder>, which trains "
            "these embeddings themselves",
        )


def _refuse_layer_inputs(network: Mapping[str, Any]) -> None:
    if network.get("hidden_size_per_layer_input"):
        raise ModelError(
            f"every layer of a {network.get('model_type')} model has embeddings of its own for "
            "each token, and virtual tokens have none",
            where="tuning",
            fix="use tuning=lora",
        )
