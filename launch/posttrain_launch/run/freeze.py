"""The run folder: made once, by the process where the command is typed, with all that is fixed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from posttrain_dist.config import RunConfig, complete
from posttrain_dist.engine import DeepSpeed
from posttrain_dist.errors import ConfigError, PosttrainError
from posttrain_dist.files import write_atomic
from posttrain_dist.planner.job import DataFacts
from posttrain_dist.planner.plan import Choice
from posttrain_dist.planner.plan_file import plan_entry, write_plan
from posttrain_dist.planner.settle import Settled, settle
from posttrain_dist.prepare import find_prepared
from posttrain_launch.compose.command_line import typed_keys
from posttrain_launch.compose.composer import Composed
from posttrain_launch.compose.paths import with_absolute_paths
from posttrain_launch.run.versions import installed_versions

PACKAGES = ("posttrain-dist", "torch", "transformers", "deepspeed", "ray", "hydra-core", "wandb")


def freeze(
    composed: Composed,
    command: str,
    *,
    force: bool = False,
    place: Path | None = None,
    adjust: Callable[[RunConfig, Choice | None], RunConfig] | None = None,
) -> Path:
    """Plan a run, make its folder `<output_root>/<name>/<time>`, and write what the run is.

    config.yaml (every value, absolute paths, the chosen options), overrides.yaml, run.json,
    plan.json where it could be planned, and deepspeed.json, a copy of the user's own DeepSpeed JSON
    where there is one.

    Args:
        command: the command line, kept as the run's lineage.
        force: also make one that cannot fit.
        place: of a trial of a sweep: the folder to make, in the folder of its sweep.
        adjust: of a trial: the config once its plan is known.

    Returns:
        The absolute path of the folder, which no other process has.

    Raises:
        ConfigError: the configuration contradicts itself, what it asks for cannot fit, or the
            folder cannot be made.
    """
    settled = _settle(complete(with_absolute_paths(composed.config)), composed, force=force)
    config = settled.config if adjust is None else adjust(settled.config, settled.choice)
    now = datetime.now().astimezone()
    parent = Path(config.output_root) / config.name if place is None else place.parent
    folder = _new_folder(parent, place.name if place else now.strftime("%Y%m%d-%H%M%S"))
    config, deepspeed_json = _keep_deepspeed_json(config, folder)
    text = config.to_yaml() + OmegaConf.to_yaml({"choices": dict(sorted(composed.choices.items()))})
    lineage = {
        "id": "-".join([config.name, *([] if place is None else [parent.name]), folder.name]),
        "name": config.name,
        "created": now.isoformat(timespec="seconds"),
        "command": command,
        "host": platform.node(),
        "versions": installed_versions(PACKAGES),
        "git": git_state(Path(__file__).parents[1]),
        "wandb_id": secrets.token_hex(4),
        "hashes": {"config": hashlib.sha256(text.encode()).hexdigest()},
        **({} if settled.choice is None else {"plan": plan_entry(settled.choice)}),
    }
    try:
        (folder / "logs").mkdir()
        if settled.choice is not None:
            write_plan(folder, settled.choice)
        for name, content in {
            "deepspeed.json": deepspeed_json,
            "overrides.yaml": OmegaConf.to_yaml(composed.overrides),
            "run.json": json.dumps(lineage, indent=1) + "\n",
            "config.yaml": text,  # last: with it the folder is a run
        }.items():
            if content is not None:
                write_atomic(folder / name, content, to_disk=True)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _not_writable(folder, error) from error
    for line in settled.lines:
        print(line, file=sys.stderr)
    return folder


def _settle(config: RunConfig, composed: Composed, *, force: bool) -> Settled:
    """The run as it is begun, with nothing left to choose."""
    facts = None
    with contextlib.suppress(PosttrainError):  # which preparing the data says in full
        found = find_prepared(config)
        facts = None if found is None else DataFacts.read(found)
    return settle(config, facts, typed_keys(composed.overrides), force=force)


def _keep_deepspeed_json(config: RunConfig, folder: Path) -> tuple[RunConfig, str | None]:
    """The config with its DeepSpeed JSON in the run folder, where later edits do not reach it."""
    engine = config.engine
    if not isinstance(engine, DeepSpeed) or engine.config is None:
        return config, None
    text = Path(engine.config).read_text(encoding="utf-8")
    engine = replace(engine, config=str(folder / "deepspeed.json"))
    return replace(config, engine=engine), text


def _new_folder(parent: Path, stamp: str) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
            try:
                folder.mkdir(exist_ok=False)  # the one step that two processes cannot both do
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise _not_writable(parent, error) from error
    raise _not_writable(parent, OSError("too many runs of this second"))


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"the run folder cannot be made in {folder}: {error.strerror or error}",
        where="output_root",
        fix="set output_root=<a folder that you may write to>",
    )


# ---------------------------------------------------------------------------------- lineage


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that this program runs from; None for an installed wheel."""
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str | None:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=False,
            encoding="utf-8",
        )
        return done.stdout.strip() if done.returncode == 0 else None

    # A wheel's folder may lie in somebody's checkout, of which it is no part.
    if git("ls-files", "--error-unmatch", "cli.py") is None:
        return None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    return {"commit": commit, "changed": bool(changes)} if commit else None
