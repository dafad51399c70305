"""RunConfig -> data, dtype, engine, policy, source: what training and evaluation build alike."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from posttrain_kernels import (
    linear_cross_entropy,
    linear_logprob,
    multiplies_fast,
    product_speedup,
)
from torch import nn

from posttrain_dist import dist
from posttrain_dist.checkpoint.manifest import Layout, Manifest, Recipe
from posttrain_dist.config import Dtype, RunConfig, single_process_rule
from posttrain_dist.data.chat.rendering.served import Served
from posttrain_dist.data.packs.balance import Cost
from posttrain_dist.data.packs.loader import PackedSource
from posttrain_dist.data.packs.mixing import make_mixture
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.data.prepared.summary import Summary
from posttrain_dist.diagnosis.facts import ModelFacts
from posttrain_dist.dist import Process
from posttrain_dist.engine import AdamW, DeepSpeed, Single
from posttrain_dist.engine.base import TrainEngine
from posttrain_dist.engine.optimizers import ParameterRules
from posttrain_dist.engine.update_check import UpdateCheck
from posttrain_dist.files import read_object, write_atomic
from posttrain_dist.models import Weights
from posttrain_dist.models.architectures.dropout import switch_off_dropout
from posttrain_dist.models.architectures.known import TRAINED
from posttrain_dist.models.classifier import classifier_network
from posttrain_dist.models.finite import refuse_nonfinite
from posttrain_dist.models.folder import (
    check_folder,
    grown_config,
    network_of,
    read_network,
    read_shape,
    resolve,
)
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Extends, Policy
from posttrain_dist.models.quantized import check_base, check_fits
from posttrain_dist.objectives.base import TokenLoss
from posttrain_dist.tuning.base import AdapterTuning, Quantize

_log = logging.getLogger(__name__)
# Below this ratio a measurement of products decides nothing: the machine may be busy.
_CLEARLY = 1.2

# ------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What `prepare` wrote, as training needs it."""

    train: Examples
    heldout: Examples
    fingerprint: dict[str, Any]  # digests and settings of everything that went in
    special_tokens: dict[int, str]  # id -> metric name, whose loss is reported by itself
    end_token_ids: list[int]  # that supervised turns end with, the most common one first
    served: Served | None  # the chat templates for the export; null: there are none

    @property
    def channels(self) -> list[str]:
        """Names; `Example.channel` is an index into them."""
        return list(self.train.channels)


def open_prepared(folder: Path) -> PreparedData:
    """Open the prepared folder of a run.

    Raises:
        DataError: it was not prepared, or by another version.
    """
    summary = Summary.read(folder)
    return PreparedData(
        train=Examples.open(folder, "train"),
        heldout=Examples.open(folder, "eval"),
        fingerprint=summary.inputs,
        special_tokens=summary.special_tokens,
        end_token_ids=summary.end_token_ids,
        served=Served.read(folder),
    )


# -------------------------------------------------------------------------- engine and model


def pick_dtype(choice: Dtype, config: RunConfig | None = None) -> torch.dtype:
    """`auto`: bfloat16 where the hardware multiplies it fast, else float32.

    GPUs say so; of a CPU the instructions are asked for, and with a config, products are timed at
    the shape of its model's MLP: a dtype that is faster by more than a fifth is taken.
    """
    if choice is not Dtype.auto:
        return torch.bfloat16 if choice is Dtype.bfloat16 else torch.float32
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    speedup = 1.0
    if config is not None:
        shape = read_shape(config.model.path)
        speedup = product_speedup(
            torch.bfloat16,
            shape.hidden_size,
            shape.intermediate_size,
            rows=config.data.max_length,
        )
        _log.info("products in bfloat16 run at %.3g times the speed of float32", speedup)
    if 1 / _CLEARLY <= speedup <= _CLEARLY:
        return torch.bfloat16 if multiplies_fast(torch.bfloat16) else torch.float32
    return torch.bfloat16 if speedup > 1 else torch.float32


def frozen_dtype(config: RunConfig, run_folder: Path) -> torch.dtype:
    """The dtype of a run, chosen once: a run that goes on, also elsewhere, keeps its own.

    Rank 0 chooses, on a machine that trains: the one that types the command may be another.
    """
    file = run_folder / "logs" / "dtype.json"

    def choose() -> str:
        kept = read_object(file).get("dtype")
        if config.train.dtype is Dtype.auto and kept in (Dtype.bfloat16.name, Dtype.float32.name):
            return str(kept)
        name = str(pick_dtype(config.train.dtype, config)).removeprefix("torch.")
        write_atomic(file, json.dumps({"dtype": name}))
        return name

    return torch.bfloat16 if dist.from_main(choose) == Dtype.bfloat16.name else torch.float32


def make_engine(config: RunConfig, process: Process, dtype: torch.dtype) -> TrainEngine:
    """The engine of the config; DeepSpeed needs the process group to be there.

    Raises:
        ConfigError: engine=single with several workers.
    """
    device = dist.device(process)
    rules = parameter_rules(config)
    if isinstance(config.engine, Single):
        rule = single_process_rule(process.world, f"there are {process.world} workers")
        if not rule.holds:
            raise rule.error()
        from posttrain_dist.engine.single import SingleEngine

        return SingleEngine(config.optimizer, device, rules)  # type: ignore[arg-type]
    from posttrain_dist.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config.engine, config.optimizer, device, dtype, rules)  # type: ignore[arg-type]


def parameter_rules(config: RunConfig) -> ParameterRules:
    """What the tuning says of parameters, as the engines ask it."""
    tuning = config.tuning
    return ParameterRules(tuning.decays, tuning.lr_ratio, tuning.sparse)


def build_engine(
    config: RunConfig, process: Process, dtype: torch.dtype, channels: list[str]
) -> tuple[TrainEngine, Policy]:
    """The engine, and the policy that it holds."""
    engine = make_engine(config, process, dtype)
    return engine, build_policy(config, engine, dtype, channels)


def build_policy(
    config: RunConfig,
    engine: TrainEngine,
    dtype: torch.dtype,
    channels: list[str],
    base: nn.Module | None = None,
) -> Policy:
    """Load and tune the model inside the engine's context and hand it to the engine.

    Args:
        base: a model that was loaded already, and is not tuned yet.
    """
    model = load_tuned(config, engine, dtype, base)
    noise = config.train.neftune_alpha
    policy = make_policy(model, len(channels), config.tuning, neftune_alpha=noise)
    engine.attach(policy)
    if config.model.weights is Weights.load:
        refuse_nonfinite(policy, resolve(config.model.path), prefix="causal_lm.")
    return policy


def load_tuned(
    config: RunConfig, engine: TrainEngine, dtype: torch.dtype, base: nn.Module | None = None
) -> nn.Module:
    """The model of a run, with what its tuning puts into it, inside the engine's context."""
    folder = resolve(config.model.path)
    _check_init_from(config, folder)
    nf4 = on_nf4(config, folder)
    if nf4:
        _check_room(config, folder, engine, dtype)
    model = load_model(
        config.model,
        folder,
        dtype=dtype,
        seed=config.seed,
        # A base in NF4 is whole on every rank before ZeRO-3 shards it.
        materialise=nullcontext() if nf4 else engine.materialise(),
        attach=config.tuning.attach,
        nf4=nf4,
        device=engine.device,
        base=base,
        scalar=config.objective.own_rows,
    )
    if config.objective.no_dropout:
        switch_off_dropout(model)
    return model


def parameter_counts(policy: Policy) -> dict[str, int]:
    """How many numbers are trained, and how many the model has; of packed ones what they stand for.

    Returns:
        "trained" and "parameters".
    """

    def count(parameter: Any) -> int:
        packed = getattr(parameter, "quant_state", None)
        if packed is not None:
            return math.prod(packed.shape)
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    every = list(policy.parameters())
    trained = sum(count(parameter) for parameter in every if parameter.requires_grad)
    return {"trained": trained, "parameters": sum(map(count, every))}


def make_update_check(
    config: RunConfig,
    engine: TrainEngine,
    policy: Policy,
    learning_rate: Callable[[int], float],
    start: int,
) -> UpdateCheck:
    """The hook that sees whether what is trained moves, from update `start` on."""
    rules, optimizer = parameter_rules(config), config.optimizer
    assert isinstance(optimizer, AdamW)
    return UpdateCheck(engine, policy, optimizer, rules, learning_rate, start)


def _check_init_from(config: RunConfig, base: Path) -> None:
    """Refuse an adapter to go on with that is damaged, or of another base."""
    if isinstance(config.tuning, AdapterTuning) and (named := config.tuning.init_from):
        from posttrain_dist.tuning.adapters import base_check

        dist.from_main(lambda: base_check.check_base(Path(named), base))
        tokens = config.model.add_tokens
        dist.from_main(lambda: base_check.check_tokens(Path(named), base, tokens))


def on_nf4(config: RunConfig, folder: Path) -> bool:
    """Whether the base is in NF4: as the tuning wants it, or as it is stored.

    Raises:
        ModelError: it is stored so, and the tuning would train it itself.
    """
    tuning, fresh = config.tuning, config.model.weights is Weights.random
    adapters = isinstance(tuning, AdapterTuning)
    found = check_folder(folder, need_weights=not fresh)
    stored = check_base(found, folder, adapters=adapters, fresh=fresh)
    return stored or (isinstance(tuning, AdapterTuning) and tuning.quantize is Quantize.nf4)


def _check_room(config: RunConfig, folder: Path, engine: TrainEngine, dtype: torch.dtype) -> None:
    """Refuse a base in NF4 that the GPU of this rank cannot take, if its tensors are known."""
    if engine.device.type == "cuda" and read_shape(config.model.path).model_type in TRAINED:
        check_fits(
            read_network(config.model.path),
            folder,
            bytes_per_value=dtype.itemsize,
            free_bytes=torch.cuda.mem_get_info(engine.device)[0],
            world=engine.world,
        )


def make_policy(
    model: nn.Module, num_channels: int, tuning: Extends | None, *, neftune_alpha: float = 0.0
) -> Policy:
    """A loaded model, with what `tuning` attached to it, as one forward with the fused head."""
    kernels = HeadKernels(linear_cross_entropy, linear_logprob)
    return Policy(model, kernels, num_channels, tuning, neftune_alpha=neftune_alpha)


def make_source(
    config: RunConfig, examples: Examples, process: Process, *, mixed: bool = True
) -> PackedSource:
    """The batches of this rank; `mixed`: drawn from sources by weight, as training does."""
    shape = read_shape(config.model.path, config.model.add_tokens)
    return PackedSource(
        examples,
        config.objective,
        mixture=make_mixture(config.data, config.seed, examples) if mixed else None,
        cost=Cost.of_model(shape.hidden_size, shape.num_layers, shape.vocab_size),
        vocab_size=shape.vocab_size,
        max_length=config.data.max_length,
        window=config.data.pack_window,
        seed=config.seed,
        batch_size=config.train.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=process.rank,
        world=process.world,
    )


# ------------------------------------------------------------------------------ what a run is


def run_manifest(
    config: RunConfig, data: PreparedData, process: Process, dtype: torch.dtype
) -> Manifest:
    """The manifest of this run's checkpoints, but for their step."""
    engine = config.engine
    name = f"zero{engine.stage}" if isinstance(engine, DeepSpeed) else "single"
    folder = resolve(config.model.path)
    found = check_folder(folder, need_weights=False)
    network = network_of(grown_config(folder, found, config.model.add_tokens))
    if config.objective.own_rows:
        network = classifier_network(network)
    return Manifest(
        step=0,
        recipe=Recipe(data.channels, _recipe(config, data.fingerprint), network),
        layout=Layout(name, process.world, str(dtype).removeprefix("torch.")),
        settings=_settings(config),
        lineage={
            "end_token_ids": data.end_token_ids,
            "template_sha256": data.fingerprint["template"],
            "template_variables": data.fingerprint.get("variables", {}),
            **_base_digest(config),
        },
    )


def _base_digest(config: RunConfig) -> dict[str, str]:
    """What an adapter is bound to; of no use where the whole model is trained."""
    if config.tuning.whole_model:
        return {}
    from posttrain_dist.tuning.adapters.base_digest import digest_of_model

    return {"base_digest": dist.from_main(lambda: digest_of_model(config.model))}


def model_facts(config: RunConfig, policy: Policy, source: PackedSource) -> ModelFacts:
    """What the diagnosis knows of a run beside its numbers."""
    return ModelFacts(
        parameters=sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters()),
        vocab_size=int(policy.config.vocab_size),
        random_weights=config.model.weights is Weights.random,
        token_loss=isinstance(config.objective, TokenLoss),
        target_shares=source.target_shares(),
    )


def _settings(config: RunConfig) -> dict[str, str]:
    """What else decides the numbers of a run, beside its recipe and layout."""
    values = config.to_dict()
    groups = ("model", "objective", "tuning", "optimizer", "engine", "train")
    flat = {f"{group}.{key}": str(v) for group in groups for key, v in values[group].items()}
    if isinstance(config.engine, DeepSpeed) and config.engine.config:
        own = Path(config.engine.config).read_bytes()  # a copy in the run folder
        flat["engine.config"] = f"a JSON of digest {hashlib.sha256(own).hexdigest()[:8]}"
    # The first two are of one start and change nothing; the others are of layout and recipe.
    other = ("train.resume", "train.rehearse", "train.dtype", "train.batch_size")
    return {key: value for key, value in flat.items() if key not in other}


def _recipe(config: RunConfig, fingerprint: dict[str, Any]) -> dict[str, str]:
    """What decides which samples are in which step."""
    given = {name: value for name, value in fingerprint.items() if name != "versions"}
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode())
    return {
        "objective": type(config.objective).__name__.lower(),
        "seed": str(config.seed),
        "train.batch_size": str(config.train.batch_size),
        "data.max_length": str(config.data.max_length),
        "data.pack_window": str(config.data.pack_window),
        "data.mix_by": config.data.mix_by.name,
        "data.sources": str({n: astuple(s)[1:] for n, s in config.data.sources.items()}),
        "data": digest.hexdigest()[:16],
    }
