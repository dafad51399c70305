"""The next fallback of a run that ran out of memory, in its folder."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path

import yaml

from posttrain_dist.config import RunConfig, complete
from posttrain_dist.errors import OutOfMemory
from posttrain_dist.files import read_object, write_atomic
from posttrain_dist.planner.fallbacks import following, with_choice
from posttrain_dist.planner.plan import Choice
from posttrain_dist.planner.plan_file import plan_entry, read_choice, write_plan


def next_choice(folder: Path) -> Choice | None:
    """What a run falls back to when its memory is not there; None: nothing, or it has trained.

    Only a run that `auto` planned has anything to fall back to.
    """
    if (folder / "checkpoints").exists() or _has_updates(folder):
        return None
    choice = read_choice(folder)
    return following(choice) if choice is not None else None


def fall_back(config: RunConfig, folder: Path, failure: OutOfMemory) -> tuple[RunConfig, str]:
    """Make the run of a folder that of its next fallback, after the one before ran out of memory.

    config.yaml, plan.json and run.json are those of the new one; run.json lists what was tried.

    Returns:
        The new config, and one line that says so.

    Raises:
        OutOfMemory: `failure`; there is no fallback.
    """
    upcoming = next_choice(folder)
    if upcoming is None or upcoming.chosen.plan is None:
        raise failure
    before = read_choice(folder)
    old = before.chosen.name if before is not None else ""
    changed = complete(with_choice(config, upcoming.chosen))
    words, happened = upcoming.chosen.plan.overrides, failure.what.partition(":")[0]
    _record(folder, changed, upcoming, {"tried": old, "where": failure.where, "what": failure.what})
    return changed, (
        f"{old}: {happened} ({failure.where}); starting again with {upcoming.chosen.name} "
        f"({' '.join(words)})"
    )


def _record(folder: Path, config: RunConfig, choice: Choice, failed: dict[str, str]) -> None:
    path = folder / "config.yaml"
    old = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = config.to_yaml()
    if "choices" in old:
        text += yaml.safe_dump({"choices": old["choices"]})
    lineage = read_object(folder / "run.json")
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    lineage["fallbacks"] = [*lineage.get("fallbacks", []), {"time": now, **failed}]
    lineage["plan"] = plan_entry(choice)
    config_hash = hashlib.sha256(text.encode()).hexdigest()
    lineage["hashes"] = {**lineage.get("hashes", {}), "config": config_hash}
    (folder / "logs" / "plan.json").unlink(missing_ok=True)  # of the steps that were not made
    write_plan(folder, choice)
    write_atomic(folder / "run.json", json.dumps(lineage, indent=1) + "\n", to_disk=True)
    write_atomic(path, text, to_disk=True)


def _has_updates(folder: Path) -> bool:
    log = folder / "samples.log"  # one line for each
    return log.is_file() and log.stat().st_size > 0
