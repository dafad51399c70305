"""`-m` of verbs other than train, and of launchers or sweepers that are not ours: Hydra runs it.

Each trial is a command in a process of its own; a failed one does not end the sweep.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from posttrain_dist.files import read_rows
from posttrain_dist.preflight import check_inputs
from posttrain_dist.report.numbers import loss_of_log
from posttrain_dist.report.text_tables import text_table
from posttrain_launch.compose.command_line import CommandLine
from posttrain_launch.compose.composer import Composed, Composer, to_composed
from posttrain_launch.compose.paths import with_absolute_paths
from posttrain_launch.failures import BAD_CONFIG, FAILED, STOPPED, print_error


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the closing table."""

    overrides: list[str]
    state: str
    code: int
    held_out: float | None  # the last held-out loss
    folder: Path | None


@dataclass(slots=True)
class Commands:
    """The trials of one `-m` command."""

    trials: list[Command] = field(default_factory=list)

    def trial(
        self,
        config: DictConfig,
        hydra: DictConfig,
        act: Callable[[Composed], tuple[int, Path | None]],
    ) -> float | None:
        """Run one trial; returns its last held-out loss, which a sweeper may minimise."""
        overrides: list[str] = list(hydra.overrides.task)
        print(f"\ntrial {len(self.trials)}: {' '.join(overrides)}", flush=True)
        folder: Path | None = None
        code: int = BAD_CONFIG
        try:
            code, folder = act(to_composed(config, hydra))
        except Exception as error:
            print_error(error)
        held_out = last_held_out(folder) if folder is not None else None
        states = {0: "done", STOPPED: "stopped"}
        state = states.get(code, f"failed ({code})")
        self.trials.append(Command(overrides, state, code, held_out, folder))
        if code == STOPPED:
            raise KeyboardInterrupt
        return held_out

    def run_subprocess(self, arguments: list[str], debug: bool) -> int:
        """`posttrain ARGUMENTS` in a process of its own, which gets the signals."""
        command = [sys.executable, "-P", "-m", "posttrain_launch.cli", *arguments]
        child = subprocess.Popen([*command, *(["--debug"] if debug else [])])
        with _signals_to(child):
            return child.wait()

    def table(self) -> str:
        """One line per trial, named by what the trials do not all share."""
        shared = set.intersection(*(set(trial.overrides) for trial in self.trials))
        rows = [
            (
                " ".join(o for o in trial.overrides if o not in shared) or "-",
                trial.state,
                loss_of_log(trial.held_out),
                str(trial.folder or "-"),
            )
            for trial in self.trials
        ]
        return "\n" + text_table(("trial", "state", "held-out loss", "run folder"), rows)

    def exit_code(self) -> int:
        """0 if every trial came to its end."""
        return FAILED if any(trial.code for trial in self.trials) else 0


def run_by_hydra(line: CommandLine, composer: Composer) -> int:
    """Have Hydra run the trials, and print their table; the exit code."""
    commands = Commands()

    def run_one(config: DictConfig) -> float | None:
        hydra: Any = HydraConfig.get()
        return commands.trial(config, hydra, lambda composed: _run_one(line, composed, commands))

    try:
        overrides = [*line.overrides, "hydra.mode=MULTIRUN"]
        composer.hydra.multirun(composer.config_name, run_one, overrides)
    except KeyboardInterrupt:
        if commands.trials:
            print(commands.table())
        return STOPPED
    print(commands.table())
    return commands.exit_code()


def _run_one(line: CommandLine, composed: Composed, commands: Commands) -> tuple[int, Path | None]:
    if line.verb == "train":
        from posttrain_launch.run.freeze import freeze

        check_inputs(with_absolute_paths(composed.config))
        folder = freeze(composed, line.typed, force=line.force)
        code = commands.run_subprocess(["run", str(folder), "--new"], line.debug)
        return code, folder if folder.is_dir() else None
    arguments = [line.verb, *composed.overrides]
    if line.flags.config_dir is not None:
        arguments += ["--config-dir", line.flags.config_dir]
    for flag, values in line.own.items():
        arguments += [f"{flag}={value}" for value in values] or [flag]
    return commands.run_subprocess(arguments, line.debug), None


@contextlib.contextmanager
def _signals_to(child: subprocess.Popen[Any]) -> Iterator[None]:
    """Ctrl-C reaches the child by itself, being typed at the terminal; the others are passed on."""

    def forward(number: int, _: object) -> None:
        child.send_signal(number)

    handlers: dict[int, Any] = {signal.SIGINT: lambda *_: None}
    handlers |= dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2), forward)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        handlers[signal.SIGHUP] = forward
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_held_out(folder: Path) -> float | None:
    """The last held-out loss in a run's metrics."""
    rows = read_rows(folder / "metrics.jsonl")
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    return float(losses[-1]) if losses else None
