"""DeepSpeed ZeRO 0 to 3, the only file that imports deepspeed.

DeepSpeed averages gradients over the ranks; a loss that is already divided by the global
denominator must be summed. That mean is undone here, by `world` times the loss.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.engine.base import stored_tensors
from posttrain_dist.engine.ds_config import deepspeed_config
from posttrain_dist.engine.ds_state import ShardedState
from posttrain_dist.engine.ds_tuning import (
    Sizes,
    loading_zero,
    set_local_size,
    tuned_zero,
)
from posttrain_dist.engine.memory import keep_freed_memory
from posttrain_dist.engine.optimizers import (
    ParameterRules,
    adamw,
    parameter_groups,
    set_learning_rate,
    trained_parameters,
)
from posttrain_dist.engine.state_files import DEEPSPEED_TYPES, fitting, read_state, without_code
from posttrain_dist.files import DigestWriter, FileDigest
from posttrain_dist.flow import Batch, Loss

TAG = "deepspeed"  # folder of DeepSpeed's own files inside a checkpoint


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed for the device that is here, without compiling anything."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        set_local_size()
    with stderr_of_children():
        import deepspeed

        # Its CPU start-up would compile an extension (30 s, needs g++ and ninja) that gloo
        # replaces. This table is made when it is first looked at, by trying a linker.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed  # type: ignore[no-any-return]


@contextmanager
def stderr_of_children() -> Iterator[None]:
    """What a compiler prints goes where Python's stderr goes: to the log of the rank.

    A process inherits descriptor 2, which stays the terminal where `sys.stderr` is redirected.
    """
    try:
        target = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # no file stands behind it
        target = 2
    if target == 2:
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    os.dup2(target, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def _types() -> list[type]:
    """The classes of DEEPSPEED_TYPES, which a ZeRO checkpoint may make objects of."""
    places = [name.rpartition(".") for name in DEEPSPEED_TYPES]
    return [getattr(importlib.import_module(module), name) for module, _, name in places]


class DeepSpeedEngine:
    """A Policy under `deepspeed.initialize`; needs a process group."""

    def __init__(
        self,
        config: DeepSpeed,
        optimizer: AdamW,
        device: torch.device,
        dtype: torch.dtype,
        rules: ParameterRules | None = None,
    ) -> None:
        self._rules, self._dtype = rules or ParameterRules(), dtype
        self.device, self.world = device, torch.distributed.get_world_size()
        self._stage, self._optimizer = config.stage, optimizer
        self._offload = config.offload
        bf16 = dtype == torch.bfloat16
        self._json = deepspeed_config(config, clip=optimizer.clip, bf16=bf16)
        self._prefer(loading_zero(self._stage, cpu=device.type == "cpu"))
        self._deepspeed = import_deepspeed()
        backend = "nccl" if device.type == "cuda" else "gloo"
        self._deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)

    @contextmanager
    def materialise(self) -> Iterator[None]:
        if self._stage < 3:
            yield
            return
        # transformers partitions while it loads as long as this object is alive.
        from transformers.integrations import deepspeed as hf

        alive = hf.HfDeepSpeedConfig({**self._json, "train_batch_size": self.world})
        try:
            yield
        finally:
            hf.unset_hf_deepspeed_config()
            del alive

    def attach(self, policy: nn.Module) -> None:
        if self._stage < 3:
            policy.to(self.device)
        _one_dtype(policy, self._dtype)
        self._tune(policy)
        trained = trained_parameters(policy)
        groups = parameter_groups(trained, self._optimizer.weight_decay, self._rules)
        optimizer = self._make_optimizer(groups)
        with stderr_of_children():
            self._initialize(policy, optimizer)
        self._state = ShardedState(self._zero, optimizer, trained)
        self._written = _record_digests(self._engine.checkpoint_engine)

    def attach_frozen(self, policy: nn.Module) -> None:
        policy.requires_grad_(False)
        if self._stage < 3:  # each rank has all weights, and nothing is to be reduced
            self._engine: Any = policy.to(self.device)
            return
        self._tune(policy)
        with stderr_of_children():
            self._engine, *_ = self._deepspeed.initialize(model=policy, config=self._json)

    def _initialize(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        # DeepSpeed takes a step with zero gradients to make the state: rate 0, so that weight
        # decay moves nothing; stage 0 in bfloat16 also leaves Adam's step count at 1.
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self._engine, self._zero, *_ = self._deepspeed.initialize(
            model=policy, optimizer=optimizer, config=self._json
        )
        if self._stage == 0:
            optimizer.state.clear()

    def _tune(self, policy: Any) -> None:
        from posttrain_dist.models.layers import decoder_layers

        cpu = self.device.type == "cpu"
        if cpu:
            keep_freed_memory()
        embeddings = policy.causal_lm.get_input_embeddings()
        sizes = Sizes.of(policy, decoder_layers(policy), embeddings)
        self._prefer(
            tuned_zero(self._stage, sizes, world=self.world, cpu=cpu, offload=self._offload)
        )

    def _prefer(self, chosen: dict[str, Any]) -> None:
        """Take `chosen` where neither the run nor the user's JSON says otherwise."""
        self._json["zero_optimization"] = {**chosen, **self._json["zero_optimization"]}

    def _make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if self._offload and self.device.type == "cuda":
            from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled: needs g++ and ninja

            betas = (self._optimizer.beta1, self._optimizer.beta2)
            return DeepSpeedCPUAdam(  # type: ignore[no-any-return]
                groups, lr=self._optimizer.lr or 0.0, betas=betas, eps=self._optimizer.eps
            )
        return adamw(groups, self._optimizer)

    def forward(self, batch: Batch, objective: Any, denominators: Any) -> Loss:
        loss: Loss = self._engine(batch, objective, denominators)
        return loss

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world)

    def step(self, lr: float) -> torch.Tensor | float:
        set_learning_rate(self._zero.param_groups, lr)
        norm: torch.Tensor | float | None = None
        if self._stage == 0 and not self._json["bf16"]["enabled"]:
            limit = self._optimizer.clip or float("inf")
            norm = nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit)
        self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        assert norm is not None, "compute_grad_norm is refused in a user's JSON"
        return norm

    def forget_updates(self) -> None:
        self._state.forget_updates()
        for counter in ("global_steps", "global_samples", "micro_steps", "skipped_steps"):
            setattr(self._engine, counter, 0)
        if hasattr(self._zero, "loss_scale_config"):  # stage 0 in bfloat16 counts once more
            self._zero.loss_scale_config.cur_iter = 0

    def train(self, mode: bool) -> None:
        self._engine.train(mode)

    def full_tensors(
        self, wanted: Callable[[str], bool] = lambda name: True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in stored_tensors(self._engine.module):
            if wanted(name):
                with self._whole(tensor):
                    yield name, tensor.detach()

    def save_state(self, folder: Path) -> dict[str, FileDigest]:
        self._written.clear()
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        return {path.relative_to(folder).as_posix(): d for path, d in self._written.items()}

    def load_state(self, folder: Path) -> None:
        with fitting(folder), without_code(_types()):
            found, _ = self._engine.load_checkpoint(
                str(folder), tag=TAG, load_lr_scheduler_states=False
            )
            if found is None:  # it only logs that it found nothing
                raise ValueError("DeepSpeed finds no state of this rank in it")

    def local_state(
        self, wanted: Callable[[str], bool], *, moments: bool = True
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        return self._state.local(wanted, moments=moments)

    def named_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        return self._state.whole()

    def load_named_state(self, get: Callable[[str], dict[str, torch.Tensor]], step: int) -> None:
        self._engine.global_steps = step
        parameters = trained_parameters(self._engine.module)
        for name, master in self._state.load(get):
            with self._whole(parameters[name], write=True):
                parameters[name].data.copy_(master)

    def load_full_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in stored_tensors(self._engine.module):
            if name in tensors:
                with self._whole(tensor, write=True):
                    tensor.data.copy_(tensors[name])

    def _whole(self, tensor: Any, *, write: bool = False) -> AbstractContextManager[Any]:
        """The context in which `tensor` is whole; what all ranks write in it stays."""
        if not hasattr(tensor, "ds_id"):
            return nullcontext()
        writer = 0 if write else None
        return self._deepspeed.zero.GatheredParameters(  # type: ignore[no-any-return]
            [tensor], modifier_rank=writer
        )


def _one_dtype(policy: nn.Module, dtype: torch.dtype) -> None:
    """Give what a tuning inserted the dtype of the model; its float32 master comes after.

    Below stage 3 DeepSpeed does it itself; at stage 3 it asks for one dtype and does not.
    """
    for parameter in policy.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def _record_digests(writer: Any) -> dict[Path, FileDigest]:
    """Digests of what DeepSpeed's checkpoint engine `writer` writes on this rank from now on.

    Its plain one, `TorchCheckpointEngine`, hands the path to `torch.save`, which takes an open
    file as well. What another one (of a user's JSON) writes comes without: it is read back.
    """
    written: dict[Path, FileDigest] = {}
    if type(writer).__name__ != "TorchCheckpointEngine":
        return written
    save_to = writer.save

    def save(state_dict: Any, path: str) -> None:
        with DigestWriter(Path(path)) as file:
            save_to(state_dict, file)
        written[Path(path)] = file.digest

    writer.save = save
    return written


def read_full_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a saved state, float32, one after the other, without a process group."""
    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    whole = folder / TAG / "mp_rank_00_model_states.pt"
    with fitting(folder):
        if not list((folder / TAG).glob("*optim_states.pt")):  # stage 0 keeps no shards
            state = read_state(whole, mmap=True)["module"]
        else:
            with without_code(_types()):
                state = get_fp32_state_dict_from_zero_checkpoint(
                    str(folder), tag=TAG, lazy_mode=True
                )
    for name, tensor in state.items():
        yield name.removeprefix("causal_lm."), tensor.contiguous()
    # Stage 1 keeps frozen parameters with the model alone, where DeepSpeed's reader does not look.
    if not whole.exists():  # stage 3 has shards of all
        return
    with fitting(folder):
        model = read_state(whole, mmap=True, types=_types())["module"]
    for name in sorted(model.keys() - state.keys()):
        yield name.removeprefix("causal_lm."), model[name].contiguous()
