"""The network of a reward model: the backbone of a causal LM, with a head of one row."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from posttrain_dist.models.classifier import SCORE
from posttrain_dist.models.network.tensors import Network, Tensor


@lru_cache(maxsize=2)
def scored_network(network: Network) -> Network:
    """The same without its language-model head; tied embeddings stay as embeddings."""
    shape = network.shape
    return replace(
        network,
        shape=replace(shape, tied=False),
        head=(Tensor(f"{SCORE}.weight", (1, shape.hidden_size)),),
        outside=tuple(one for one in network.outside if one.out_features != shape.vocab_size),
    )
