"""W&B as a mirror of metrics.jsonl, kept by a process of its own: whatever W&B meets, we train on.

    rank 0: WandbSink  --starts-->  wandb_mirror.py: import wandb, follow metrics.jsonl, upload

The training never waits for a server, imports no wandb, and loses nothing with it: the mirror can
be made again from metrics.jsonl at any time.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from posttrain_dist.errors import ConfigError
from posttrain_dist.files import write_atomic
from posttrain_dist.files.temporary import remove_abandoned
from posttrain_dist.logs import notify
from posttrain_dist.metrics import LoggingConfig, WandbMode

# What it may take, once the training has ended, to upload the rest; the process keeps within it.
CLOSE_S = 75.0
# WANDB_MODE -> what `logging.wandb=auto` becomes. It is W&B's own switch, so its users have it set.
MODES = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}


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
    """`online`, `offline` or `off`; `auto` asks WANDB_MODE, and else whether there is a key.

    Raises:
        ConfigError: `online` without a key, or a WANDB_MODE that W&B does not know.
    """
    named = os.environ.get("WANDB_MODE")
    if mode is not WandbMode.auto:
        chosen = mode.name
    elif not named:
        return "online" if has_key() else "offline"
    elif named in MODES:
        chosen = MODES[named]
    else:
        raise ConfigError(
            f"WANDB_MODE is {named}, which W&B does not know",
            where="logging.wandb",
            fix="set WANDB_MODE to online, offline or disabled, or unset it, or set logging.wandb",
        )
    if chosen == "online" and not has_key():
        raise ConfigError(
            "is online, and there is no W&B key",
            where="logging.wandb" if mode is WandbMode.online else "WANDB_MODE",
            fix="set WANDB_API_KEY, or run `wandb login`, or use logging.wandb=offline",
        )
    return chosen


class WandbSink:
    """One W&B run per training: its id lives in the run folder, our `step` is its only axis.

    A server that cannot be reached, that answers with an error, or that is gone later: the run is
    kept offline and one line says how `wandb sync` sends it. What W&B itself refuses (a folder that
    cannot be written, a project's name) is one line too. Nothing here raises.

    Args:
        mode: of `resolve_mode`, not off.
        start_step: step of the checkpoint that the run goes on from; metrics.jsonl has no later
            row now.
        details: the run's config on its W&B page.
    """

    def __init__(
        self,
        config: LoggingConfig,
        run_folder: Path,
        *,
        mode: str,
        run_id: str,
        name: str,
        start_step: int,
        details: dict[str, Any],
    ) -> None:
        self._folder = run_folder
        self._process: subprocess.Popen[bytes] | None = None
        settings = {
            "mode": mode,
            "project": config.project,
            "entity": config.entity,
            "group": config.group,
            "id": run_id,
            "name": name,
            "start_step": start_step,
            "details": details,
        }
        # W&B checks every WANDB_ variable, and the mode is decided here.
        environment = {k: v for k, v in os.environ.items() if k != "WANDB_MODE"}
        try:
            write_atomic(run_folder / "logs" / "wandb.json", json.dumps(settings))
            with (run_folder / "logs" / "wandb.log").open("ab") as log:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "posttrain_dist.metrics.wandb_mirror",
                        str(run_folder),
                    ],
                    stdin=subprocess.PIPE,  # never written: its end says that the training ended
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=run_folder,  # no folder of the caller's may hide a package
                    env=environment,
                    start_new_session=True,  # a signal ends the training first
                )
        except OSError as error:
            notify(run_folder, f"W&B is off: {error}; metrics.jsonl has every number")

    def close(self) -> None:
        """Have the rest uploaded, and wait for that within a limit."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            code = self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code:
            remove_abandoned()
            log = self._folder / "logs" / "wandb.log"
            notify(
                self._folder,
                f"W&B's process ended early (see {log}); metrics.jsonl has every number, and what "
                f"is in {self._folder / 'wandb'} can be sent with `wandb sync`",
            )
