"""What the planner says of one run. Everything in bytes, seconds and counts; JSON and back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Item(StrEnum):
    """What memory is taken for; the value is what a reader sees."""

    weights = "weights"
    quantisation = "quantisation constants"
    adapter = "adapter weights"
    master = "float32 master weights"
    moments = "optimizer moments"
    gradients = "gradients"
    gathered = "gathered parameters (ZeRO-3)"
    buckets = "reduction buckets"
    activations = "activations"
    checkpoints = "checkpointed inputs of layers"
    adapter_activations = "activations that adapters keep"
    virtual_tokens = "virtual tokens"
    dequantised = "dequantised weights"
    head = "head: logits of a chunk, gradients"
    workspace = "temporaries of the update"
    batch = "batch"
    reference_model = "reference model"
    saving = "copies for saving"
    loading = "copies for loading"
    offloaded = "offloaded optimizer state"
    offloaded_weights = "offloaded parameters"
    # Named here, and filled by the parts of training that they belong to.
    kv_cache = "KV cache and rollout batch"
    critic = "critic"
    reward_model = "reward model"


class PhaseName(StrEnum):
    """The phases of a run, in their order."""

    load = "load"
    reference = "reference log-probabilities"
    forward = "forward and loss"
    backward = "backward"
    update = "optimizer step"
    evaluate = "evaluation"
    save = "save"
    export = "export"


@dataclass(frozen=True, slots=True)
class Phase:
    """What is allocated at the fullest moment of one phase, in bytes by item.

    Attributes:
        if_room: how much more is taken for a moment where a GPU has room for it; no run needs it.
        on_host: what the host holds instead where a GPU has no room, for each rank.
    """

    name: PhaseName
    items: dict[Item, int]
    if_room: int = 0
    on_host: int = 0

    @property
    def allocated_bytes(self) -> int:
        """Sum of the items."""
        return sum(self.items.values())


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one device, or of one host."""

    phases: tuple[Phase, ...]
    slack_bytes: int = 0  # that the allocator holds beyond what is allocated
    context_bytes: int = 0  # of CUDA and NCCL; of a host: of each process's programs

    @property
    def peak(self) -> Phase:
        """The fullest phase: the peak is a maximum over phases, never their sum."""
        return max(self.phases, key=lambda phase: phase.allocated_bytes)

    @property
    def total_bytes(self) -> int:
        """Allocated at the peak, slack and context."""
        return self.peak.allocated_bytes + self.slack_bytes + self.context_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How long it takes.

    Attributes:
        terms: seconds of a step by what they are for: compute, memory, network, update, offload,
            and forwards of a reference.
        binds: the term that decides.
        tokens: of the whole run; None: the data is not known, and hours are for a billion tokens.
    """

    step_s: float
    terms: dict[str, float]
    binds: str
    tokens_per_step: int
    tokens_per_s: float  # of all GPUs together
    model_flops_share: float  # MFU: what `model_flops` counts over the peak of the devices
    tokens: int | None
    hours: float
    gpu_hours: float
    traffic_bytes: dict[str, int]  # sent by one GPU in one step, by purpose
    checkpoint_s: float  # to write one
    checkpoint_every_s: float  # Young and Daly's best interval
    effective_share: float  # of the time that trains, with failures and checkpoints
    reference_s: float = 0.0  # of the pass before step 1; 0: there is none
    reference_tokens: int | None = None  # of that pass; None: not known, and it is of a billion


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run on one machine.

    Attributes:
        settings: what the run is, flat and readable: "tuning": "LoRA (rank 16)", ...
        overrides: the command line words that make this run of the given one.
        hardware: name -> what one node has, as shown.
        capacity_bytes: what one GPU (or, on a CPU, one rank) has.
        margin_bytes: of it that is left free.
        warnings: sentences.
    """

    settings: dict[str, str]
    overrides: tuple[str, ...]
    hardware: dict[str, str]
    parameters: int
    trained: int
    workers: int
    nodes: int
    device: Memory
    host: Memory  # of the fullest host, all its ranks together
    capacity_bytes: int
    host_capacity_bytes: int
    margin_bytes: int
    on_gpu: bool = True  # else each rank is a process on CPUs
    checkpoint_bytes: int  # on disk, one
    export_bytes: int
    reference_bytes: int = 0  # on disk, of the pass before step 1
    speed: Speed
    warnings: tuple[str, ...] = field(default=())

    @property
    def spare_bytes(self) -> int:
        """Of a GPU, beyond peak and margin; negative: so much is missing."""
        return self.capacity_bytes - self.margin_bytes - self.device.total_bytes

    @property
    def host_spare_bytes(self) -> int:
        """The same of a host."""
        return self.host_capacity_bytes - self.host.total_bytes

    @property
    def fits(self) -> bool:
        """Whether GPU and host take it."""
        return self.spare_bytes >= 0 and self.host_spare_bytes >= 0

    @property
    def largest_item(self) -> Item:
        """What takes most where it is tightest."""
        memory = self.device if self.spare_bytes < 0 or self.fits else self.host
        items = memory.peak.items
        return max(items, key=lambda item: items[item])

    def to_json(self) -> dict[str, Any]:
        """Plain values, with what follows from them."""
        plain: dict[str, Any] = dataclasses.asdict(self)
        for name in ("device", "host"):
            memory: Memory = getattr(self, name)
            plain[name] |= {
                "peak_phase": str(memory.peak.name),
                "allocated_bytes": memory.peak.allocated_bytes,
                "total_bytes": memory.total_bytes,
            }
        derived = ("fits", "spare_bytes", "host_spare_bytes", "largest_item")
        return plain | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True, slots=True)
class Tried:
    """One fallback: what it is called, and its plan, or why there is none."""

    name: str
    plan: Plan | None
    refused: str = ""  # why it was not planned
    leanest: Plan | None = None  # of the same method, with the settings that take least memory


@dataclass(frozen=True, slots=True)
class Choice:
    """What `auto` takes: the first of `tried` that fits, and why not those before it."""

    tried: tuple[Tried, ...]
    chosen: Tried
