"""What `posttrain run RUN key=value` may change of a frozen run, and how that is done and kept.

`posttrain submit RUN cluster.time=...` changes how the run's job is made, and nothing of the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from posttrain_dist.checkpoint import resume, store
from posttrain_dist.checkpoint.manifest import read_manifest
from posttrain_dist.config import GROUPS, Ray, RunConfig, Slurm, complete, problems
from posttrain_dist.errors import CheckpointError, ConfigError, PosttrainError, raise_all
from posttrain_dist.files import read_object, write_atomic
from posttrain_launch.compose.keys import has_key, unknown_key_fix, value_problems

RESUME = "train.resume"
FURTHER = ("train.steps", "train.epochs", "train.tokens")  # with more of these, a run ends later
WRITTEN = ("config.yaml", "overrides.yaml", "run.json", "plan.json", "FINISHED")
# What leaves the run the one that it is: the same samples in the same steps, on the same layout.
ALLOWED = (
    RESUME,
    *FURTHER,
    "train.save_every",
    "train.eval_every",
    "train.log_every",
    "optimizer.lr",
    "optimizer.clip",
    "checkpoint.keep",
    "checkpoint.export",
    "logging.wandb",
    "cluster.max_failures",
)


JOB_KEYS = tuple(
    f"cluster.{name}"
    for name in sorted(
        {each.name for each in dataclasses.fields(Slurm)}
        - {each.name for each in dataclasses.fields(Ray)}
        - {"nodes", "gpus_per_node"}  # the layout of the run's workers
    )
)


def parse(
    words: list[str],
    *,
    allowed: tuple[str, ...] = ALLOWED,
    verb: str = "run",
    taken: str = ", ".join(ALLOWED),
) -> dict[str, Any]:
    """The overrides that were typed.

    Args:
        allowed: keys.
        verb: that takes them.
        taken: they, in words.

    Raises:
        ConfigError, SeveralErrors: one is no `key=value`, or its key is fixed.
    """
    found: list[PosttrainError] = []
    values: dict[str, Any] = {}
    base = OmegaConf.structured(complete(RunConfig(cluster=Slurm())))
    for word in words:
        key, equals, text = word.partition("=")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            values[key] = text
        if not equals:
            found.append(ConfigError("is no key=value", where=word, fix=f"such as {RESUME}=never"))
        elif not has_key(base, key) and key not in (*GROUPS, "experiment"):
            fix = unknown_key_fix(base, key)
            found.append(ConfigError("unknown key", where=key, fix=fix))
        elif key not in allowed:
            found.append(
                ConfigError(
                    "is fixed when a run is made",
                    where=key,
                    fix=f"posttrain {verb} takes {taken}; for anything else, another "
                    f"run is started with posttrain {'train' if verb == 'run' else verb}",
                )
            )
    raise_all(found)
    return values


@contextmanager
def applied(folder: Path, config: RunConfig, values: dict[str, Any]) -> Iterator[RunConfig]:
    """The changed run of `folder`, which nobody else drives meanwhile; the change is recorded.

    `train.resume` is an act of this start and no value of the run: `never` puts the checkpoints
    aside, one of them those that are newer. A start that ends before it trains, for whatever
    reason, leaves the run as it was.

    Raises:
        PosttrainError: the run does not allow it; nothing was changed.
    """
    changed = _changed(config, values)
    _check_end(folder, changed, values)
    plan = folder / "logs" / "plan.json"  # a new file as training begins
    began = _identity(plan)
    kept = {path: _content(path) for path in (folder / name for name in WRITTEN)}
    moves = _put_aside(folder, values.get(RESUME, "auto"))
    try:
        _record(folder, changed, values)
        yield changed
    except BaseException:
        if _identity(plan) == began:
            _restore(kept, moves)
        raise


def change_job(folder: Path, config: RunConfig, words: list[str], *, keep: bool) -> RunConfig:
    """The run with another way to make its job.

    Args:
        keep: record the change in its folder.

    Raises:
        ConfigError, SeveralErrors: a word changes more than that; nothing was changed.
    """
    taken = "cluster.time, cluster.partition and the like, but no other cluster.nodes and GPUs"
    values = parse(words, allowed=JOB_KEYS, verb="submit", taken=taken)
    changed = _changed(config, values)
    if keep:
        _record(folder, changed, values)
    return changed


def _restore(kept: dict[Path, str | None], moves: dict[Path, Path]) -> None:
    for path, content in kept.items():
        if content is None:
            path.unlink(missing_ok=True)
        else:
            write_atomic(path, content, to_disk=True)
    for source, target in moves.items():
        if not source.exists():
            target.rename(source)
    for aside in {target.parent for target in moves.values() if target.parent.is_dir()}:
        with suppress(OSError):  # it holds others
            aside.rmdir()


def _identity(path: Path) -> tuple[int, int] | None:
    """What is another one when the file was written again."""
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _check_end(folder: Path, changed: RunConfig, values: dict[str, Any]) -> None:
    """Whether there is a step left to train.

    Raises:
        ConfigError: the run is finished, or further than it would then go.
    """
    if RESUME in values:
        return
    if (folder / "FINISHED").is_file() and not set(values) & set(FURTHER):
        raise ConfigError(
            "is finished",
            where=str(folder),
            fix=f"{RESUME}=never starts it again, a larger train.steps goes on with it",
        )
    whole, steps = store.whole_checkpoints(folder), changed.train.steps
    at = read_manifest(whole[-1]).step if whole else 0
    if steps is not None and steps < at:
        raise ConfigError(
            f"is {steps}, and the run is at step {at}",
            where="train.steps",
            fix=f"give more than {at}; {RESUME}=step-N of its checkpoints, or never, goes back",
        )


def _content(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _record(folder: Path, changed: RunConfig, values: dict[str, Any]) -> None:
    """Write the changed config, what was typed, and both to run.json."""
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    lineage = read_object(folder / "run.json")
    if values.get(RESUME) == "never":
        lineage["wandb_id"] = secrets.token_hex(4)  # another curve
    choices = (yaml.safe_load(text) or {}).get("choices")
    text = changed.to_yaml() + (OmegaConf.to_yaml({"choices": choices}) if choices else "")
    typed = [f"{key}={_shown(value)}" for key, value in values.items()]
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    lineage["continued"] = [*lineage.get("continued", []), {"time": now, "overrides": typed}]
    config_hash = hashlib.sha256(text.encode()).hexdigest()
    lineage["hashes"] = {**lineage.get("hashes", {}), "config": config_hash}
    kept = folder / "overrides.yaml"
    before = yaml.safe_load(kept.read_text(encoding="utf-8")) if kept.is_file() else []
    write_atomic(kept, OmegaConf.to_yaml([*(before or []), *typed]), to_disk=True)
    write_atomic(folder / "run.json", json.dumps(lineage, indent=1) + "\n", to_disk=True)
    write_atomic(folder / "config.yaml", text, to_disk=True)
    (folder / "FINISHED").unlink(missing_ok=True)


def _changed(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    node = OmegaConf.structured(config)
    others = {key: value for key, value in values.items() if key != RESUME}
    raise_all(
        [fault for key, value in others.items() for fault in value_problems(node, key, value)]
    )
    for key, value in others.items():
        OmegaConf.update(node, key, value)
    changed: RunConfig = OmegaConf.to_object(node)  # type: ignore[assignment]
    raise_all(problems(changed))
    return changed


def _put_aside(folder: Path, choice: str) -> dict[Path, Path]:
    """Put aside the checkpoints that `choice` of `train.resume` does not go on from."""
    if choice == "auto":
        return {}
    if choice == "never":
        return resume.archive(folder)
    named = Path(str(choice)).expanduser().absolute()
    own = store.checkpoints(folder)
    if named not in own:
        names = ", ".join(path.name for path in own) or "it has none"
        raise CheckpointError(
            f"is no checkpoint of this run ({names})",
            where=f"{RESUME}={choice}",
            fix="give never, or one of its checkpoints; from another run's, posttrain train starts",
        )
    return resume.archive(folder, own[own.index(named) + 1 :])


def _shown(value: Any) -> str:
    return "null" if value is None else json.dumps(value) if isinstance(value, bool) else str(value)
