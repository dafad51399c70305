"""RunConfig -> dtype, engine, policy, batches: what training and evaluation build alike."""

from __future__ import annotations

import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob, multiplies_fast

from posttrain_dist import dist
from posttrain_dist.config import Dtype, RunConfig
from posttrain_dist.data.packs.balance import Cost
from posttrain_dist.data.packs.loader import PackedSource
from posttrain_dist.data.packs.mixing import Mixture, SourceSpec
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.dist import Process
from posttrain_dist.engine import Single
from posttrain_dist.engine.base import TrainEngine
from posttrain_dist.errors import ConfigError
from posttrain_dist.models.folder import check_folder, resolve
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.models.shape import ModelShape


def pick_dtype(choice: Dtype) -> torch.dtype:
    """`auto`: bfloat16 on GPUs that have it and on CPUs with AMX, else float32.

    Without AMX a CPU multiplies bfloat16 many times slower than float32.
    """
    if choice is not Dtype.auto:
        return torch.bfloat16 if choice is Dtype.bfloat16 else torch.float32
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if multiplies_fast(torch.bfloat16) else torch.float32


def make_engine(config: RunConfig, process: Process, dtype: torch.dtype) -> TrainEngine:
    """The engine of the config; DeepSpeed needs the process group to be there.

    Raises:
        ConfigError: engine=single with several workers.
    """
    device = dist.device(process)
    if isinstance(config.engine, Single):
        if process.world > 1:
            raise ConfigError(
                f"single runs in one process, and there are {process.world} workers",
                where="engine",
                fix="use engine=zero0 (or zero1, zero2, zero3), or cluster.workers=1",
            )
        from posttrain_dist.engine.single import SingleEngine

        return SingleEngine(config.optimizer, device)  # type: ignore[arg-type]
    from posttrain_dist.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config.engine, config.optimizer, device, dtype)  # type: ignore[arg-type]


def build_policy(
    config: RunConfig, engine: TrainEngine, dtype: torch.dtype, channels: list[str]
) -> Policy:
    """Load and tune the model inside the engine's context and hand it to the engine."""
    model = load_model(
        config.model,
        resolve(config.model.path),
        dtype=dtype,
        seed=config.seed,
        materialise=engine.materialise(),
        attach=config.tuning.attach,
    )
    kernels = HeadKernels(linear_cross_entropy, linear_logprob)
    policy = Policy(model, kernels, len(channels), config.tuning)
    engine.attach(policy)
    return policy


def make_mixture(config: RunConfig, examples: Examples) -> Mixture | None:
    """What an epoch draws from which source; None where there is one source.

    Raises:
        DataError: a source with a weight has no row.
    """
    if not config.data.sources:
        return None
    specs = [
        SourceSpec(
            name=name,
            weight=source.weight,
            max_passes=source.max_passes,
            schedule=source.schedule,
        )
        for name, source in config.data.sources.items()
    ]
    by = config.data.mix_by
    return Mixture(examples.sources, examples.supervised, specs, by, config.seed)


def make_source(
    config: RunConfig, examples: Examples, process: Process, *, mixed: bool = True
) -> PackedSource:
    """The batches of this rank; `mixed`: drawn from sources by weight, as training does."""
    folder = resolve(config.model.path)
    shape = ModelShape.of(check_folder(folder, need_weights=False), str(folder / "config.json"))
    return PackedSource(
        examples,
        config.objective,
        mixture=make_mixture(config, examples) if mixed else None,
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
