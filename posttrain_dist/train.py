"""One training of one worker, top to bottom. Read this file third."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from posttrain_dist import dist
from posttrain_dist.build import (
    PreparedData,
    build_engine,
    frozen_dtype,
    make_source,
    make_update_check,
    model_facts,
    open_prepared,
    parameter_counts,
    run_manifest,
)
from posttrain_dist.checkpoint import resume, store
from posttrain_dist.checkpoint.manifest import Manifest
from posttrain_dist.checkpoint.notices import Notices
from posttrain_dist.checkpoint.trained_state import load_trained
from posttrain_dist.config import RunConfig, complete, refuse_auto
from posttrain_dist.config.advice import settings_line, warnings
from posttrain_dist.data.packs.collate import filler
from posttrain_dist.data.packs.loader import PackedSource
from posttrain_dist.data.packs.prefetch import RunSource
from posttrain_dist.data.packs.probe import make_probe
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.dist import Process
from posttrain_dist.engine import DeepSpeed
from posttrain_dist.engine.base import TrainEngine
from posttrain_dist.engine.optimizers import learning_rate
from posttrain_dist.engine.state_files import fitting, step_of_file
from posttrain_dist.errors import CheckpointError
from posttrain_dist.export import RehearseExport, RunExport
from posttrain_dist.files import write_atomic
from posttrain_dist.flow import StepInfo
from posttrain_dist.hooks import EndOnNonfinite, Evaluate, Log, Save
from posttrain_dist.logs import log_to_file, notify
from posttrain_dist.loop import Stop, fit
from posttrain_dist.metrics.figure_file import figure_writer
from posttrain_dist.metrics.special_tokens import TokenMeter
from posttrain_dist.models.folder import resolve
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import Objective
from posttrain_dist.planner.plan_file import planned_lines
from posttrain_dist.prepare.cache import cache_folder
from posttrain_dist.reference.open_reference import RunReference, Worker, open_reference
from posttrain_dist.rehearsal.out_of_memory import Reached, naming_out_of_memory
from posttrain_dist.rehearsal.rehearse import Rehearsal
from posttrain_dist.tuning.adapters.base_check import not_compared
from posttrain_dist.tuning.base import AdapterTuning

Build = Callable[[RunConfig, Process, torch.dtype, list[str]], tuple[TrainEngine, Policy]]
PLAN, OUTCOME = Path("logs", "plan.json"), Path("logs", "outcome.json")
_log = logging.getLogger(__name__)


def train(config: RunConfig, run_folder: Path, process: Process | None = None) -> None:
    """Train one run in this worker; every worker of the run calls it once.

    `posttrain_dist.prepare.prepare(config, run_folder / "prepared")` comes first. The run goes on
    from its newest checkpoint if `train.resume` says so. It ends early, with a checkpoint, when a
    file `STOP` appears in the run folder. logs/outcome.json says how it ended.

    Raises:
        PosttrainError: config, data, model or checkpoint cannot be used.
    """
    for _ in training(config, run_folder, process or Process()):
        pass


def training(
    config: RunConfig, run_folder: Path, process: Process, build: Build = build_engine
) -> Iterator[StepInfo]:
    """`train`, step by step, after its hooks ran; `build`: several runs may share what it makes."""
    config = refuse_auto(complete(config))
    run_folder = _enter(config, Path(run_folder).absolute(), process)
    with _watched(config, run_folder, process) as reached:
        # Data, model and engine.
        data = open_prepared(run_folder / "prepared")
        dtype = frozen_dtype(config, run_folder)
        engine, policy = build(config, process, dtype, data.channels)
        counts = _report_settings(config, run_folder, policy, engine.device)
        source = make_source(config, data.train, process)
        heldout = make_source(config, data.heldout, process, mixed=False) if data.heldout else None
        steps = source.total_steps(config.train.steps, config.train.epochs, config.train.tokens)

        # The head is checked, the reference opened, a checkpoint read, the first batch checked.
        _check_head(engine, policy, config.objective, data.train)
        cache = cache_folder(config.data.cache)
        worker = Worker(config, run_folder, process, engine, policy, dtype, data, cache)
        reference = open_reference(worker, source, heldout, steps)  # by the weights of the start
        manifest = reference.recorded_in(run_manifest(config, data, process, dtype))
        start = _resume(config, run_folder, engine, manifest, steps)
        if start < steps:
            _check_first_batch(policy, source, reference, start + 1, engine.device)

        # Steps, and what happens after each.
        meter = _meter(config, data, engine.device)
        batches, held = reference.source, reference.heldout
        evaluate = _evaluate(config, run_folder, engine, held, data)
        rate = partial(learning_rate, config.optimizer, total_steps=steps)  # type: ignore[arg-type]
        update_check = make_update_check(config, engine, policy, rate, start)
        Rehearsal(config, run_folder, engine, batches, held, meter, manifest).run(start, steps)
        export = RunExport(config, run_folder, manifest, data.served, partial(notify, run_folder))
        facts = model_facts(config, policy, source)
        with closing(reference), Log(config, run_folder, engine, source, facts, start) as log:
            _write_main(run_folder / PLAN, total_steps=steps, start_step=start, **counts)
            updates = fit(
                engine=engine,
                source=batches,
                objective=config.objective,
                meter=meter,
                describe=meter.train_metrics,
                learning_rate=rate,
                steps=steps,
                start=start,
                seed=config.seed,
                # A save ends a window of logging: a resumed run averages over the same steps.
                log_every=(config.train.log_every, config.train.save_every or steps),
                stop_requested=lambda: _stop_file(run_folder) or log.stop_requested(),
                hooks=(
                    evaluate,
                    log,
                    update_check,
                    RehearseExport(export, engine.full_tensors),
                    Save(config, run_folder, engine, manifest, log),
                    EndOnNonfinite(run_folder),
                ),
            )
            last = StepInfo(start, last=True)
            for last in updates:
                reached.step = last.step
                yield last
            if (completed := last.last and not last.stopped) and config.checkpoint.export:
                export.write(engine.full_tensors, last.step)
        _write_main(run_folder / OUTCOME, **_outcome(last.step, steps, completed, log))


@contextmanager
def _watched(config: RunConfig, run_folder: Path, process: Process) -> Iterator[Reached]:
    """With a log of this rank, and memory that is missing named as what it is."""
    log = run_folder / "logs" / f"rank-{process.rank}.log"
    with log_to_file(log), naming_out_of_memory(config, run_folder) as reached:
        yield reached


def _enter(config: RunConfig, run_folder: Path, process: Process) -> Path:
    """Join the process group where the engine needs one, and make the run folder."""
    (run_folder / "logs").mkdir(parents=True, exist_ok=True)
    if isinstance(config.engine, DeepSpeed):
        dist.start(process)
    if process.is_main and not (run_folder / "config.yaml").exists():
        write_atomic(run_folder / "config.yaml", config.to_yaml())
    return run_folder


def _report_settings(
    config: RunConfig, run_folder: Path, policy: Policy, device: torch.device
) -> dict[str, int]:
    """What is trained and how fast, on the terminal where it is not full tuning; and warnings.

    Returns:
        "trained" and "parameters", numbers of them.
    """
    counts = parameter_counts(policy)
    if dist.rank() != 0:
        return counts
    for line in planned_lines(run_folder):
        _log.info("%s", line)
    lines = warnings(config, on_cpu=device.type == "cpu")
    if isinstance(config.tuning, AdapterTuning) and (continued := config.tuning.init_from):
        said = not_compared(Path(continued), resolve(config.model.path))
        lines += [said] if said else []
    settings = settings_line(config, **counts)
    if counts["trained"] == counts["parameters"]:
        _log.info("%s", settings)
    else:
        lines = [settings, *lines]
    for line in lines:
        notify(run_folder, line)
    return counts


def _meter(config: RunConfig, data: PreparedData, device: torch.device) -> TokenMeter:
    return TokenMeter(data.channels, data.special_tokens, config.objective, device)


def _evaluate(
    config: RunConfig,
    run_folder: Path,
    engine: TrainEngine,
    heldout: RunSource | None,
    data: PreparedData,
) -> Evaluate:
    """The hook that evaluates, with a meter of its own."""
    figures = figure_writer(run_folder, data.channels, config.objective)
    meter = _meter(config, data, engine.device)
    return Evaluate(engine, heldout, config.objective, meter, config.train.eval_every, figures)


def _write_main(path: Path, **values: Any) -> None:
    """Write an object for the driver, on rank 0 alone."""
    if dist.rank() == 0:
        write_atomic(path, json.dumps(values))


def _stop_file(run_folder: Path) -> Stop:
    return Stop.requested if (run_folder / "STOP").exists() else Stop.none


def _resume(
    config: RunConfig, run_folder: Path, engine: TrainEngine, run: Manifest, steps: int
) -> int:
    """Load the checkpoint that `train.resume` names; its step, 0 where there is none."""
    choice, notices = config.train.resume, Notices(run_folder)
    if choice == "never":
        dist.on_main(lambda: resume.archive(run_folder))
    found = resume.choose(choice, run_folder, step_of_file, notices.add)
    if found is None:
        return 0
    there = resume.check_compatible(found, run, steps)
    changed = resume.changed_settings(there, run)
    settings = f" with other settings: {'; '.join(changed)}" if changed else ""
    _load(config, engine, there, found)
    for moved in dist.from_main(lambda: resume.put_newer_aside(run_folder, found)):
        notices.add(f"{moved.name} is kept in {moved.parent}")
    notices.add(f"going on from step {there.step}{settings}")
    notices.record(found, there.step)
    return there.step


def _load(config: RunConfig, engine: TrainEngine, there: Manifest, found: Path) -> None:
    """The state of a checkpoint: what is trained by name, or the engine's own files."""
    if there.by_name == config.tuning.whole_model:
        raise CheckpointError(
            f"holds {'what an adapter trains' if there.by_name else 'the whole model'}, and "
            f"tuning={config.to_dict()['tuning']['kind']} trains another part of it",
            where=str(found),
            fix="resume with the same tuning; to train on with another one, start a new run with "
            "model.path=<that run>/export; or use train.resume=never",
        )
    if there.by_name:
        with fitting(found):
            load_trained(engine, config.tuning.kept, found / store.STATE)
    else:
        engine.load_state(found / store.STATE)


@torch.no_grad()
def _check_head(
    engine: TrainEngine, policy: Policy, objective: Objective, examples: Examples
) -> None:
    """Compare the head with the model's own, after a forward through the engine.

    Every other use of the policy needs one before it: in it ZeRO-3 finds out which modules read
    the weights of others (DoRA's do), and gathers these from then on, in a plain call too.
    """
    engine.train(False)  # no dropout
    batch = filler(objective).to(engine.device)
    count = objective.count(batch)
    engine.forward(batch, objective, count._make([1.0] * len(count)))
    policy.check_head(make_probe(examples, own_rows=objective.own_rows).to(engine.device))


def _check_first_batch(
    policy: Policy, source: PackedSource, reference: RunReference, step: int, device: torch.device
) -> None:
    """On this rank's first batch of `step`, the fused head beside its own reference, and the policy
    beside the model that it is compared with.
    """
    batch = source.step(step)[0].to(device)
    found = dist.on_all(lambda: policy.check_parity(batch))
    shown = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    if shown:  # a scalar head is not fused
        _log.info("the fused head differs from the reference on the first batch by: %s", shown)
    reference.check_start(step)
    if device.type == "cuda":  # so that the reported peak is that of training
        torch.cuda.reset_peak_memory_stats(device)


def _outcome(step: int, steps: int, completed: bool, log: Log) -> dict[str, Any]:
    """How the training ended, for the driver."""
    found: dict[str, Any] = {"outcome": "completed" if completed else "stopped"}
    found |= {"step": step, "total_steps": steps}
    alarm = log.monitor.stop if log.monitor is not None else None
    if alarm is not None and completed and step < steps:
        found["early_stop"] = alarm.line()
    return found
