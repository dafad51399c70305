"""W&B, the only file that imports wandb. It mirrors metrics.jsonl and can be rebuilt from it."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any

from posttrain_dist.errors import ConfigError
from posttrain_dist.files import read_rows
from posttrain_dist.flow import StepInfo
from posttrain_dist.metrics import LoggingConfig, WandbMode


def has_key() -> bool:
    """Whether WANDB_API_KEY or ~/.netrc holds a key for W&B."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def resolve_mode(mode: WandbMode) -> str:
    """`online`, `offline` or `off`.

    Raises:
        ConfigError: `online` without a key.
    """
    if mode is WandbMode.auto:
        return "online" if has_key() else "offline"
    if mode is WandbMode.online and not has_key():
        raise ConfigError(
            "is online, and there is no W&B key",
            where="logging.wandb",
            fix="set WANDB_API_KEY, or run `wandb login`, or use logging.wandb=offline",
        )
    return mode.name


class WandbSink:
    """One W&B run per training: its id lives in the run folder, our `step` is its only axis.

    Offline, a killed process leaves a file that may be torn; so a resumed run writes the whole
    history again from metrics.jsonl and moves the older files to `wandb/superseded/`.
    """

    def __init__(
        self,
        config: LoggingConfig,
        run_folder: Path,
        *,
        run_id: str,
        name: str,
        start_step: int,
        details: dict[str, Any],
    ) -> None:
        import wandb

        mode = resolve_mode(config.wandb)
        folder = run_folder / "wandb"
        if mode == "offline":
            _supersede(folder)
        folder.mkdir(exist_ok=True)
        settings = wandb.Settings(
            x_disable_meta=True, x_disable_stats=True, save_code=False, silent=True, console="off"
        )
        resuming = mode == "online" and start_step > 0
        self._run = wandb.init(
            mode="online" if mode == "online" else "offline",
            project=config.project,
            entity=config.entity,
            id=run_id,
            name=name,
            dir=str(run_folder),
            config=details,
            resume="allow" if resuming else None,
            settings=settings,
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if not resuming:
            for row in read_rows(run_folder / "metrics.jsonl"):
                if row["step"] <= start_step and start_step:
                    self._run.log(row)

    def write(self, info: StepInfo) -> None:
        if info.metrics:
            self._run.log(info.row())

    def close(self) -> None:
        self._run.finish()


def _supersede(folder: Path) -> None:
    older = [path for path in folder.glob("offline-run-*") if path.is_dir()]
    aside = folder / "superseded"
    for path in older:
        aside.mkdir(exist_ok=True)
        taken = len(list(aside.glob(f"{path.name}*")))  # names go by the second
        path.replace(aside / (f"{path.name}-{taken}" if taken else path.name))
