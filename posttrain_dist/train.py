"""One training of one worker: its objects, its hooks, its end. Read this file third."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch

from posttrain_dist import dist
from posttrain_dist.build import build_policy, make_engine, make_source, pick_dtype
from posttrain_dist.checkpoint import resume, store
from posttrain_dist.checkpoint.hf_folder import write_hf_folder
from posttrain_dist.config import RunConfig, complete
from posttrain_dist.data.chat.template import load_template
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.data.prepared.summary import Summary
from posttrain_dist.diagnosis.alarms import ModelFacts
from posttrain_dist.diagnosis.watch import Watch
from posttrain_dist.dist import Process
from posttrain_dist.engine import DeepSpeed
from posttrain_dist.engine.optimizers import learning_rate
from posttrain_dist.errors import TrainingError
from posttrain_dist.files import write_whole
from posttrain_dist.flow import Batch, StepInfo
from posttrain_dist.logs import logged_to
from posttrain_dist.loop import END_EARLY, GO_ON, LEAVE, Fit, Hook, evaluate
from posttrain_dist.metrics import WandbMode
from posttrain_dist.metrics.sinks import JsonlSink, SampleLog, Sink
from posttrain_dist.metrics.special_tokens import TokenMeter, special_tokens
from posttrain_dist.metrics.throughput import memory_bytes
from posttrain_dist.models import Weights
from posttrain_dist.models.folder import load_tokenizer, resolve
from posttrain_dist.objectives.base import TokenLoss

_log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------ entry


def train(config: RunConfig, run_folder: Path, process: Process | None = None) -> None:
    """Train one run in this worker; every worker of the run calls it once.

    `posttrain_dist.prepare.prepare(config, run_folder / "prepared")` comes first. The run goes on
    from its newest checkpoint if `train.resume` says so. It ends early, with a checkpoint, when a
    file `STOP` appears in the run folder.

    Raises:
        PosttrainError: config, data, model or checkpoint cannot be used.
    """
    process = process or Process()
    config = complete(config)
    run_folder = Path(run_folder).absolute()
    (run_folder / "logs").mkdir(parents=True, exist_ok=True)
    if isinstance(config.engine, DeepSpeed):
        dist.start(process)
    if process.is_main and not (run_folder / "config.yaml").exists():
        write_whole(run_folder / "config.yaml", config.to_yaml())
    with logged_to(run_folder / "logs" / f"rank-{process.rank}.log"):
        _Run(config, run_folder, process).train()


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
        self.source = make_source(config, examples, process)
        held_out = Examples.open(prepared, "eval")
        self.held_out = None
        if len(held_out):
            self.held_out = make_source(config, held_out, process, mixed=False)
        self.end_token_id = _end_token(examples, resolve(config.model.path))
        self.inputs = Summary.read(prepared).inputs
        self.recipe = _recipe(config, self.inputs)
        self.steps = self.source.total_steps(
            config.train.steps, config.train.epochs, config.train.tokens
        )
        watched = _watched_tokens(config)
        self.meter, self.eval_meter = (
            TokenMeter(self.channels, watched, config.objective, self.engine.device)
            for _ in range(2)
        )
        self.watch: Watch | None = None  # on rank 0
        self.drawn: Counter[str] = Counter()  # from each source in the whole run, on rank 0
        self.drawn_key = f"source_{config.data.mix_by.name}"
        self.engine.train(False)  # no dropout
        self.policy.check_head(self._probe(examples))
        self.sinks: list[Sink] = []
        self.began = time.time()

    def train(self) -> None:
        config = self.config
        start = self._resume()
        if start < self.steps:
            self._check_parity(start + 1)
        if self.process.is_main:
            plan = {"total_steps": self.steps, "start_step": start}
            write_whole(self.folder / "logs" / "plan.json", json.dumps(plan))
        self.sinks = dist.on_main(lambda: self._open_sinks(start)) or []
        fit = Fit(
            engine=self.engine,
            source=self.source,
            objective=config.objective,
            meter=self.meter,
            describe=self.meter.train_metrics,
            learning_rate=lambda step: learning_rate(
                config.optimizer,  # type: ignore[arg-type]
                step,
                self.steps,
            ),
            steps=self.steps,
            start=start,
            seed=config.seed,
            # A save ends a window of logging, so that a resumed run averages over the same steps.
            log_every=(config.train.log_every, config.train.save_every or config.train.log_every),
            stop_requested=self._stop_requested,
            hooks=(
                Hook(self._evaluate, config.train.eval_every, at_start=True, at_end=True),
                Hook(self._log, every=1, at_start=True),
                Hook(self._save, config.train.save_every, at_end=True),
            ),
        )
        last, completed = start, start >= self.steps
        for info in fit.run():
            last, completed = info.step, info.last and not info.stopped
            if info.broken:
                self._refuse(info)
        if completed and config.checkpoint.export:
            self._export()
        if self.process.is_main:
            self._close(last, completed)

    # ---- hooks

    def _evaluate(self, info: StepInfo) -> None:
        if info.stopped or info.broken or self.held_out is None:
            return  # someone waits for the run to end
        batches = self.held_out.eval_batches()
        tables = evaluate(self.engine, batches, self.config.objective, self.eval_meter)
        info.metrics.update(self.eval_meter.eval_metrics(tables))

    def _log(self, info: StepInfo) -> None:
        if self.process.is_main and info.step:
            self.drawn.update(self.source.source_amounts(info.step))
        if info.metrics:
            total = sum(self.drawn.values())
            for name, amount in self.drawn.items():
                info.metrics[f"{self.drawn_key}/{name}"] = amount
                info.metrics[f"source_share/{name}"] = amount / total
            info.metrics["system/memory_bytes"] = memory_bytes(self.engine.device)
            info.metrics["time_s"] = time.time() - self.began
            if self.watch is not None:
                self.watch.observe(info)
        if self.process.is_main and info.step:
            info.sample_ids = self.source.sample_ids(info.step)
        for sink in self.sinks:
            sink.write(info)

    def _save(self, info: StepInfo) -> None:
        if info.broken:
            return  # and no good checkpoint is pruned for it
        manifest = store.Manifest(
            step=info.step,
            layout=self._layout(),
            channels=self.channels,
            recipe=self.recipe,
            lineage={
                "end_token_id": self.end_token_id,
                "template_sha256": self.inputs["template"],
                **self._lineage(),
            },
        )
        keep = self.config.checkpoint.keep
        best = self.watch.best_step if self.watch is not None else None
        store.save(self.folder, manifest, self.engine.save_state, keep=keep, best=best)

    # ---- pieces

    def _check_parity(self, step: int) -> None:
        """The fused head beside the reference on this rank's first batch of `step`."""
        batch = self.source.step(step)[0].to(self.engine.device)
        found = dist.on_all(lambda: self.policy.check_parity(batch))
        if self.engine.device.type == "cuda":  # the peak that is told is that of training
            torch.cuda.reset_peak_memory_stats(self.engine.device)
        shown = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
        _log.info("the fused head differs from the reference on the first batch by: %s", shown)

    def _probe(self, examples: Examples) -> Batch:
        """The first tokens of the first sample, every second one supervised."""
        example = examples[0]
        ids_L = example.input_ids_L[:64]
        weight_L = (torch.arange(len(ids_L)) % 2 == 1).float().numpy()
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
        wish = self.config.train.resume
        if wish == "never":
            dist.on_main(lambda: resume.put_aside(self.folder))
        found = dist.from_main(lambda: resume.find(wish, self.folder))
        if found is None:
            return 0
        manifest = resume.check_fits(found, self._layout(), self.channels, self.recipe, self.steps)
        self.engine.load_state(found / "state")
        return manifest.step

    def _stop_requested(self) -> int:
        if (self.folder / "STOP").exists():
            return LEAVE
        return END_EARLY if self.watch is not None and self.watch.stop is not None else GO_ON

    def _facts(self) -> ModelFacts:
        return ModelFacts(
            parameters=sum(getattr(p, "ds_numel", p.numel()) for p in self.policy.parameters()),
            vocab_size=int(self.policy.config.vocab_size),
            random_weights=self.config.model.weights is Weights.random,
            token_loss=isinstance(self.config.objective, TokenLoss),
            asked_shares=self.source.target_shares(),
        )

    def _refuse(self, info: StepInfo) -> None:
        """End a run whose weights are lost.

        Raises:
            TrainingError: always.
        """
        self._close_logs()
        whole = store.whole_checkpoints(self.folder)
        again = f"go on from {whole[-1]} with train.resume" if whole else "start again"
        first = "; try train.dtype=float32" if info.broken <= 1 else ""
        raise TrainingError(
            "the gradient is not finite, so the weights are lost; nothing of this step is saved",
            where=f"step {info.broken}",
            fix=f"{again}, with optimizer.lr halved and optimizer.clip above 0{first}; the rows of "
            "this step are in samples.log",
        )

    def _close_logs(self) -> None:
        for sink in self.sinks:
            sink.close()
        if self.watch is not None:
            self.watch.close()

    def _close(self, last: int, completed: bool) -> None:
        """What rank 0 leaves behind for the driver."""
        self._close_logs()
        outcome = "completed" if completed else "stopped"
        said: dict[str, Any] = {"outcome": outcome, "step": last, "total_steps": self.steps}
        alarm = self.watch.stop if self.watch is not None else None
        if alarm is not None and completed and last < self.steps:
            said["early_stop"] = alarm.line()
        write_whole(self.folder / "logs" / "outcome.json", json.dumps(said))

    def _open_sinks(self, start: int) -> list[Sink]:
        self.watch = Watch(self.config.diagnose, self._facts(), self.folder, start)
        sinks: list[Sink] = [
            JsonlSink(self.folder / "metrics.jsonl", start),
            SampleLog(self.folder / "samples.log", start),
        ]
        rows = self.folder / "metrics.jsonl"
        if start and rows.stat().st_size:
            last = json.loads(rows.read_text().splitlines()[-1])
            self.began -= last.get("time_s", 0.0)
            for key, value in last.items():
                if key.startswith(f"{self.drawn_key}/"):
                    self.drawn[key.partition("/")[2]] = value
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


def _watched_tokens(config: RunConfig) -> dict[int, str]:
    """Special tokens whose loss is told by itself: id -> name."""
    tokenizer = load_tokenizer(resolve(config.model.path))
    if config.objective.rows != "messages":
        return special_tokens(tokenizer, "")
    return special_tokens(tokenizer, load_template(config.template, tokenizer).source)


def _recipe(config: RunConfig, inputs: dict[str, Any]) -> dict[str, str]:
    """What decides which samples are in which step."""
    given = {name: value for name, value in inputs.items() if name != "versions"}
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


def _end_token(examples: Examples, model_folder: Path) -> int | None:
    """The token that supervised turns end with: the last target of most of the first rows.

    Only an added token of the tokenizer can be one: a line break that a template writes after
    each turn would end every answer at its first line.
    """
    added = json.loads((model_folder / "tokenizer.json").read_text()).get("added_tokens", [])
    last: Counter[int] = Counter()
    for i in range(min(len(examples), 200)):
        example = examples[i]
        targets = example.input_ids_L[example.weight_L > 0]
        if len(targets) and not example.truncated:
            last[int(targets[-1])] += 1
    token = last.most_common(1)[0][0] if last else None
    return token if token in {entry["id"] for entry in added} else None
