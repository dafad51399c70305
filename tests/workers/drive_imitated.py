"""`python drive_imitated.py SWEEP POINT`: drives a sweep of imitated runs, and dies at a point.

line      a line of trials.jsonl is on the disk, and no folder
torn      the same, and half of another line
partial   a run folder is half made
frozen    it is made, nothing has begun
middle    trial 0 is at step 3 or later
finished  trial 0 is FINISHED
none      not at all; exits with the number of trials that are done
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from posttrain_launch.sweep import loop as loops
from posttrain_launch.sweep.backends.basic import InTurn
from posttrain_launch.sweep.backends.processes import Processes
from posttrain_launch.sweep.combinations import restore
from posttrain_launch.sweep.folder import TRIALS, State, Trial, driving, read_sweep

RUN = (sys.executable, str(Path(__file__).with_name("imitated_run.py")))
sweep, point = read_sweep(Path(sys.argv[1])), sys.argv[2]
loops.POLL_S = 0.02


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze(trial: Trial) -> None:
    given = dict(text.split("=") for text in trial.overrides)
    trial.folder.mkdir()
    if point == "partial":
        (trial.folder / "overrides.yaml").write_text("half")
        die()
    steps = int(given.get("steps", 6))
    values = [float(given["lr"]) / step for step in range(1, steps + 1)]
    content = {"steps": steps, "values": values, "step_s": float(given.get("step_s", 0.05))}
    content["fails"] = int(given.get("fails", 0))
    (trial.folder / "config.yaml").write_text(json.dumps(content))
    if point == "frozen":
        die()


class Backend(InTurn):
    def running(self) -> set[int]:
        first = sweep.folder / "trial-000"
        rows = first / "metrics.jsonl"
        if point == "middle" and rows.exists() and rows.read_text().count("\n") >= 3:
            die()
        if point == "finished" and (first / "FINISHED").exists():
            die()
        return super().running()


append = loops.append_trials


def append_and_die(folder: Path, trials: list[Trial]) -> None:
    append(folder, trials)
    if point == "torn":
        with (folder / TRIALS).open("a") as file:
            file.write('{"number": 1, "overr')
    if point in ("line", "torn"):
        die()


loops.append_trials = append_and_die
with driving(sweep.folder):
    backend = Backend(Processes(program=RUN))
    loop = loops.Loop(sweep, backend, restore(sweep), freeze, lambda line: print(line, flush=True))
    states = loop.run()
print(json.dumps({number: state.value for number, state in states.items()}))
sys.exit(0 if set(states.values()) == {State.done} else 1)
