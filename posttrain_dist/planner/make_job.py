"""RunConfig and Machine -> Job: what the run will be, by the rules that training chooses with."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from posttrain_dist.config import (
    AdamW,
    AutoEngine,
    AutoTuning,
    Dtype,
    Local,
    Ray,
    RunConfig,
    Single,
    Slurm,
)
from posttrain_dist.config.devices import DEVICES
from posttrain_dist.errors import ConfigError
from posttrain_dist.models import Attention, Weights
from posttrain_dist.models.folder import read_network as network_of_folder
from posttrain_dist.models.folder import resolve
from posttrain_dist.models.network.tensors import Network
from posttrain_dist.models.quantized import check_base
from posttrain_dist.models.shape import ModelShape
from posttrain_dist.planner.job import DataFacts, Job, Machine, fullest_row
from posttrain_dist.planner.objective.answer_rows import answer_row
from posttrain_dist.planner.objective.objective_facts import HeadKind, ObjectiveFacts
from posttrain_dist.planner.objective.scored_network import scored_network
from posttrain_dist.tuning.base import Tuning

if TYPE_CHECKING:
    from posttrain_dist.data.packs.heaviest import RowMemory

# Of the kernels for packed rows, as in models/varlen.py.
MAX_HEAD_DIM, CAPABILITY = 256, 8.0
# What /proc/cpuinfo calls the instructions for products in bfloat16: of AMX, AVX-512 and Arm.
_BFLOAT16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


def make_job(config: RunConfig, machine: Machine, facts: DataFacts | None = None) -> Job:
    """What is planned.

    Args:
        config: completed, and nothing in it is `auto` but what training decides as it starts
            (dtype, attention): these are decided here as there.
        machine: one node.
        facts: of the data; None: not known, so that every row is as long as it may be.

    Raises:
        ModelError: the folder is not one of a model that can be planned.
        ConfigError: tuning or engine is still to be chosen.
    """
    if isinstance(config.tuning, AutoTuning) or isinstance(config.engine, AutoEngine):
        raise ConfigError("is still to be chosen", where="tuning", fix="use posttrain plan")
    assert isinstance(config.optimizer, AdamW)
    network = read_network(config)
    folder, fresh = resolve(config.model.path), config.model.weights is Weights.random
    check_base(network.config, folder, adapters=not config.tuning.whole_model, fresh=fresh)
    workers, local_workers = count_workers(config, machine)
    value_bytes = bytes_per_value(config.train.dtype, machine)
    packs = math.ceil(config.train.batch_size / workers)  # of the rank that has most
    row_packs = min(config.train.micro_batch_size, packs)
    length = config.data.max_length
    supervised = facts.supervised / max(1, facts.tokens) if facts else 1.0
    row_tokens, longest = length * row_packs, length
    if facts is not None:
        row_tokens = min(row_tokens, facts.tokens or row_tokens)
        longest = min(longest, facts.longest or longest)
    job = Job(
        network=network,
        model=config.model,
        tuning=config.tuning,
        optimizer=config.optimizer,
        engine=config.engine,
        machine=machine,
        value_bytes=value_bytes,
        row_tokens=row_tokens,
        sample_tokens=longest,
        row_lengths=(lengths := fullest_row(row_tokens, longest)),
        row_parents=(-1,) * len(lengths),
        found_rows=(),
        supervised_share=supervised,
        objective=ObjectiveFacts.of(config),
        attention=choose_attention(config.model.attention, network.shape, machine, value_bytes),
        batch_size=config.train.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        accumulation=math.ceil(packs / row_packs),
        workers=workers,
        local_workers=local_workers,
        evaluates=_evaluates(config, facts),
        num_channels=facts.channels if facts else 1,
        tokens=(tokens := _run_tokens(config, facts)),
        data_tokens=_data_tokens(tokens, facts),
        config=config,
    )
    job = _with_answers(job, length, known=facts is not None)
    if facts is None or facts.rows is None:
        return job
    memory = row_memory(job.tuning, network.shape, job.attention, longest)
    found = facts.rows.heaviest(config, network.shape, workers, memory)
    return replace(job, found_rows=found)


def _with_answers(job: Job, length: int, *, known: bool) -> Job:
    """With rows of prompts and answers, where the objective compares these.

    Args:
        length: tokens of a pack.
        known: whether the share of targets is that of the data.
    """
    if not job.objective.compares:
        return job
    scores = job.objective.head is HeadKind.score
    row = answer_row(
        fullest_row(job.row_tokens, length),
        one_target=scores,
        shared=job.config.data.share_prompt,
    )
    share = job.supervised_share if known else row.supervised / sum(row.lengths)
    return replace(job.with_row(row.lengths, row.parents), supervised_share=share)


def row_memory(tuning: Tuning, shape: ModelShape, attention: str, longest: int) -> RowMemory:
    """What a model keeps of a row beside something of each token.

    Args:
        attention: as that of a `Job`.
        longest: tokens of the longest sample.
    """
    from posttrain_dist.data.packs.heaviest import RowMemory

    inserted = tuning.inserted_tokens
    prefix = tuning.virtual_tokens - inserted
    kept = prefix > 0 or shape.keeps_pairs(longest)
    pairs = attention == "eager" or (attention == "sdpa" and kept)
    return RowMemory(pairs=pairs, inserted=inserted, prefix=prefix)


def read_network(config: RunConfig) -> Network:
    """The network of `model.path`, with the vocabulary that `model.add_tokens` makes.

    A reward model has a head of one row.

    Raises:
        ModelError, SeveralErrors: the folder has no config.json of a dense causal LM.
    """
    network = network_of_folder(config.model.path, config.model.add_tokens)
    return scored_network(network) if config.objective.own_rows else network


def count_workers(config: RunConfig, machine: Machine) -> tuple[int, int]:
    """Ranks of the run, and of the node that has most, as `launch/ray` places them."""
    cluster = config.cluster
    if isinstance(config.engine, Single) or isinstance(cluster, Local):
        return 1, 1
    assert isinstance(cluster, Ray)
    if 0 < cluster.gpus_per_worker < 1:
        return 1, 1  # no two workers of a run share a GPU
    on_gpu = machine.gpu is not None and cluster.gpus_per_worker > 0
    per_node = machine.gpus_per_node if on_gpu else 0
    if isinstance(cluster, Slurm):
        if cluster.gpus_per_node is not None and cluster.gpus_per_worker > 0:
            per_node = cluster.gpus_per_node
        workers = cluster.workers or cluster.nodes * max(1, per_node)
        spread = math.ceil(workers / cluster.nodes)
    else:
        workers = spread = cluster.workers or max(1, per_node)
    # Ray fills a node with GPUs before it takes the next one.
    return workers, min(workers, per_node) if per_node else spread


def bytes_per_value(dtype: Dtype, machine: Machine) -> int:
    """2 or 4; `auto` as training chooses it, where it measures nothing (`build.pick_dtype`)."""
    if dtype is Dtype.auto:
        half = machine.gpu is not None or cpu_multiplies_bfloat16()
        return 2 if half else 4
    return 2 if dtype is Dtype.bfloat16 else 4


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for products of bfloat16, as kernels ask."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not _BFLOAT16_FLAGS.isdisjoint(flags.partition(":")[2].split())


def choose_attention(
    choice: Attention, shape: ModelShape, machine: Machine, value_bytes: int
) -> str:
    """sdpa, eager, varlen or flash: what `models/attention.py` takes on such a device."""
    match choice:
        case Attention.varlen | Attention.sdpa | Attention.eager:
            return choice.name
        case Attention.auto:
            pass
        case _:
            assert_never(choice)
    kernels = (
        machine.gpu is not None
        and DEVICES[machine.gpu].compute_capability >= CAPABILITY
        and value_bytes == 2
        and shape.widest_head <= MAX_HEAD_DIM
        and shape.value_head_dim == shape.widest_head
    )
    if kernels and not shape.attention_softcap and not shape.attention_dropout:
        return "varlen"
    if kernels and importlib.util.find_spec("flash_attn") is not None:
        return "flash"
    return "eager" if shape.attention_softcap else "sdpa"


def _evaluates(config: RunConfig, facts: DataFacts | None) -> bool:
    if facts is not None:
        return facts.heldout_tokens > 0
    data = config.data
    return data.eval is not None or data.eval_fraction > 0 or data.train == "embedded"


def _run_tokens(config: RunConfig, facts: DataFacts | None) -> int | None:
    """Of the whole run: as the config says, or all of the data."""
    train = config.train
    if train.tokens is not None:
        return train.tokens
    if train.steps is not None:  # of full packs
        return train.steps * train.batch_size * config.data.max_length
    if facts is None or not facts.tokens:
        return None
    return round(facts.tokens * (train.epochs or 1.0))


def _data_tokens(run_tokens: int | None, facts: DataFacts | None) -> int | None:
    """Of the samples that a run draws, and of those that it evaluates."""
    if facts is None:
        return None
    drawn = facts.tokens if run_tokens is None else min(run_tokens, facts.tokens)
    return drawn + facts.heldout_tokens
