"""RunConfig -> objects -> fit. Read this file third: the one place where everything meets."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from posttrain_kernels import linear_cross_entropy

from posttrain_dist import dist
from posttrain_dist.checkpoint import resume, store
from posttrain_dist.checkpoint.hf_folder import write_hf_folder
from posttrain_dist.config import Dtype, RunConfig, complete
from posttrain_dist.data.collate import collate
from posttrain_dist.data.loader import Examples, PackedSource
from posttrain_dist.dist import Process
from posttrain_dist.engine import DeepSpeed, Single
from posttrain_dist.engine.base import TrainEngine
from posttrain_dist.engine.optim import learning_rate
from posttrain_dist.errors import ConfigError
from posttrain_dist.flow import Batch, StepInfo
from posttrain_dist.loop import Fit, Hook, evaluate
from posttrain_dist.metrics import WandbMode
from posttrain_dist.metrics.channels import ChannelMeter, eval_metrics, train_metrics
from posttrain_dist.metrics.sinks import JsonlSink, SampleLog, Sink
from posttrain_dist.metrics.throughput import memory_bytes
from posttrain_dist.models.folder import resolve
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy

# ------------------------------------------------------------------------------ entry


def train(config: RunConfig, run_folder: Path, process: Process | None = None) -> None:
    """Train one run in this worker; every worker of the run calls it once.

    Data that is not yet prepared is prepared first, when this is the only worker. The run goes
    on from its newest checkpoint if `train.resume` says so. It ends early, with a checkpoint,
    when a file `STOP` appears in the run folder.

    Raises:
        PosttrainError: config, data, model or checkpoint cannot be used.
    """
    process = process or Process()
    config = complete(config)
    run_folder = Path(run_folder).absolute()
    (run_folder / "logs").mkdir(parents=True, exist_ok=True)
    if not (run_folder / "prepared").is_dir() and process.world == 1:
        from posttrain_dist.prepare import prepare

        prepare(config, run_folder / "prepared")
    owns_group = isinstance(config.engine, DeepSpeed) and dist.start(process)
    try:
        _Run(config, run_folder, process).train()
    finally:
        if owns_group:
            dist.stop()


def pick_dtype(choice: Dtype) -> torch.dtype:
    """`auto`: bfloat16 on GPUs that have it and on CPUs with AMX, else float32.

    Without AMX a CPU multiplies bfloat16 many times slower than float32.
    """
    if choice is not Dtype.auto:
        return torch.bfloat16 if choice is Dtype.bfloat16 else torch.float32
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    cpuinfo = Path("/proc/cpuinfo")
    has_amx = cpuinfo.is_file() and " amx_bf16" in cpuinfo.read_text()
    return torch.bfloat16 if has_amx else torch.float32


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
    """Load the model inside the engine's context and hand it to the engine."""
    model = load_model(
        config.model,
        resolve(config.model.path),
        dtype=dtype,
        seed=config.seed,
        materialise=engine.materialise(),
    )
    policy = Policy(model, linear_cross_entropy, len(channels))
    engine.attach(policy)
    return policy


def source_of(config: RunConfig, examples: Examples, process: Process) -> PackedSource:
    """The batches of this rank."""
    return PackedSource(
        examples,
        max_length=config.data.max_length,
        window=config.data.pack_window,
        seed=config.seed,
        batch_size=config.train.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=process.rank,
        world=process.world,
    )


# -------------------------------------------------------------------------------- run


class _Run:
    """The objects of one training, and what its hooks do with them."""

    def __init__(self, config: RunConfig, run_folder: Path, process: Process) -> None:
        self.config, self.folder, self.process = config, run_folder, process
        prepared = run_folder / "prepared"
        examples = Examples.open(prepared, "train")
        self.channels = list(examples.channels)
        self.dtype = pick_dtype(config.train.dtype)
        self.engine = make_engine(config, process, self.dtype)
        self.policy = build_policy(config, self.engine, self.dtype, self.channels)
        self.source = source_of(config, examples, process)
        self.held_out = self._eval_batches(prepared)
        self.end_token_id = _end_token(examples)
        self.steps = self.source.total_steps(config.train.steps, config.train.epochs)
        self.meter = ChannelMeter(self.channels, self.engine.device)
        self.eval_meter = ChannelMeter(self.channels, self.engine.device)
        self.policy.check_head(self._probe(examples), config.objective)
        self.sinks: list[Sink] = []
        self.began = time.time()

    def train(self) -> None:
        config = self.config
        start = self._resume()
        if self.process.is_main:
            _write_json(
                self.folder / "logs" / "plan.json",
                {"total_steps": self.steps, "start_step": start},
            )
            self.sinks = self._open_sinks(start)
        fit = Fit(
            engine=self.engine,
            source=self.source,
            objective=config.objective,
            meter=self.meter,
            describe=lambda table_C4: train_metrics(table_C4, self.channels),
            learning_rate=lambda step: learning_rate(
                config.optimizer,  # type: ignore[arg-type]
                step,
                self.steps,
            ),
            steps=self.steps,
            start=start,
            seed=config.seed,
            log_every=config.train.log_every,
            stop_requested=(self.folder / "STOP").exists,
            hooks=(
                Hook(self._evaluate, config.train.eval_every, at_start=True, at_end=True),
                Hook(self._log, every=1, at_start=True),
                Hook(self._save, config.train.save_every, at_end=True),
            ),
        )
        last = start
        for info in fit.run():
            last = info.step
        completed = last >= self.steps
        if completed and config.checkpoint.export:
            self._export()
        if self.process.is_main:
            for sink in self.sinks:
                sink.close()
            _write_json(
                self.folder / "logs" / "outcome.json",
                {
                    "outcome": "completed" if completed else "stopped",
                    "step": last,
                    "total_steps": self.steps,
                },
            )

    # ---- hooks

    def _evaluate(self, info: StepInfo) -> None:
        if info.stopped or not self.held_out:
            return  # someone waits for the run to end
        table_C4 = evaluate(self.engine, self.held_out, self.config.objective, self.eval_meter)
        info.metrics.update(eval_metrics(table_C4, self.channels))

    def _log(self, info: StepInfo) -> None:
        if info.metrics:
            info.metrics["system/memory_bytes"] = memory_bytes(self.engine.device)
            info.metrics["time_s"] = time.time() - self.began
        if self.process.is_main and info.step:
            info.sample_ids = self.source.sample_ids(info.step)
        for sink in self.sinks:
            sink.write(info)

    def _save(self, info: StepInfo) -> None:
        manifest = store.Manifest(
            step=info.step,
            layout=self._layout(),
            channels=self.channels,
            lineage={"end_token_id": self.end_token_id, **self._lineage()},
        )
        keep = self.config.checkpoint.keep
        store.save(self.folder, manifest, self.engine.save_state, keep=keep)

    # ---- pieces

    def _eval_batches(self, prepared: Path) -> list[Batch]:
        examples = Examples.open(prepared, "eval")
        if len(examples) == 0:
            return []
        return source_of(self.config, examples, self.process).eval_batches()

    def _probe(self, examples: Examples) -> Batch:
        """The first tokens of the first sample, all of them supervised."""
        example = examples[0]
        ids_L = example.input_ids_L[:64]
        weight_L = (torch.arange(len(ids_L)) > 0).float().numpy()
        probe = replace(example, input_ids_L=ids_L, weight_L=weight_L)
        return collate([probe]).to(self.engine.device)

    def _layout(self) -> dict[str, Any]:
        engine = self.config.engine
        stage = engine.stage if isinstance(engine, DeepSpeed) else None
        name = "single" if stage is None else f"zero{stage}"
        dtype = str(self.dtype).removeprefix("torch.")
        return {"engine": name, "workers": self.process.world, "dtype": dtype}

    def _lineage(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _resume(self) -> int:
        found = resume.find(self.config.train.resume, self.folder)
        if found is None:
            return 0
        manifest = resume.check_fits(found, self._layout(), self.channels)
        self.engine.load_state(found / "state")
        return manifest.step

    def _open_sinks(self, start: int) -> list[Sink]:
        sinks: list[Sink] = [
            JsonlSink(self.folder / "metrics.jsonl", start),
            SampleLog(self.folder / "samples.log", start),
        ]
        rows = self.folder / "metrics.jsonl"
        if start and rows.stat().st_size:
            last = json.loads(rows.read_text().splitlines()[-1])
            self.began -= last.get("time_s", 0.0)
        if self.config.logging.wandb is not WandbMode.off:
            from posttrain_dist.metrics.wandb_sink import WandbSink

            lineage = self._lineage()
            sinks.append(
                WandbSink(
                    self.config.logging,
                    self.folder,
                    run_id=lineage.get("wandb_id", self.folder.name),
                    name=f"{self.config.name}-{self.folder.name}",
                    start_step=start,
                    details={**self.config.to_dict(), "lineage": lineage},
                )
            )
        return sinks

    def _export(self) -> None:
        write_hf_folder(
            self.engine.full_tensors(),
            resolve(self.config.model.path),
            self.folder / "export",
            dtype=self.dtype,
            end_token_id=self.end_token_id,
        )


def _end_token(examples: Examples) -> int | None:
    """The token that supervised turns end with: the last target of most of the first rows."""
    last: Counter[int] = Counter()
    for i in range(min(len(examples), 200)):
        example = examples[i]
        targets = example.input_ids_L[example.weight_L > 0]
        if len(targets) and not example.truncated:
            last[int(targets[-1])] += 1
    return last.most_common(1)[0][0] if last else None


def _write_json(path: Path, value: Any) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value))
    aside.replace(path)
