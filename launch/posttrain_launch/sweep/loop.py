"""The one loop that drives a sweep: start trials, look at them, take in how they end.

It holds nothing that the folder of the sweep does not hold: killed anywhere, it goes on when it is
called again. What a kill leaves at each point, and what follows then:

    a line in trials.jsonl, no run folder        it is frozen and started
    a part of a run folder                       removed, frozen, started
    a run folder that never began                started
    a run in the middle, its process alive       watched
    a run in the middle, its process lost        started: it goes on from its newest checkpoint
    FINISHED                                     the search takes it in, if it has not yet
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from posttrain_dist.errors import ConfigError, PosttrainError
from posttrain_dist.files import RowFollower, write_atomic
from posttrain_launch.failures import BAD_CONFIG, FAILED, STOPPED
from posttrain_launch.lifecycle.exit_codes import Exit
from posttrain_launch.sweep.base import Backend, Search
from posttrain_launch.sweep.folder import (
    PRUNED,
    State,
    Sweep,
    Trial,
    append_trials,
    read_trials,
    trial_folder,
)
from posttrain_launch.sweep.states import (
    clear_partial,
    is_frozen,
    record_failure,
    state_of,
    was_stopped,
)

POLL_S = 0.5
ALIKE = 3  # trials that cannot begin, after which the others are not tried
TOTAL, CHANNEL = "eval/loss", "eval_channel_loss/"  # keys of metrics.jsonl
ANY_NUMBER = 1_000_000  # of trials, for a backend that queues them itself


class Loop:
    """Drives a sweep whose folder this process holds (`folder.driving`).

    Args:
        freeze: makes the run folder of a trial, or raises why there can be none.
        log: takes lines for the terminal.
        on_change: called when a trial has begun or ended.
    """

    def __init__(
        self,
        sweep: Sweep,
        backend: Backend,
        search: Search,
        freeze: Callable[[Trial], None],
        log: Callable[[str], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._sweep, self._backend, self._search = sweep, backend, search
        self._freeze, self._log, self._on_change = freeze, log, on_change
        self._trials = {trial.number: trial for trial in read_trials(sweep.folder)}
        self.was_stopped = False  # by a signal, before its end
        self._active: set[int] = set()
        self._starts: dict[int, int] = {}
        self._refused: list[str] = []  # of the trials that could not begin
        self._followers: dict[int, RowFollower] = {}
        self._values: dict[int, float] = {}  # the last of each trial

    def run(self) -> dict[int, State]:
        """Drive the sweep to its end, or until a signal stops it; where each trial stands then."""
        self._search.resume(list(self._trials.values()))
        queue = []
        for trial in self._trials.values():
            if state_of(trial).is_end:
                self._tell(trial)
            else:
                queue.append(trial)
        with _stop_requested() as stop:
            while not stop.is_set():
                self._take_in_ends(queue)
                if not (self._start(queue, stop) or (self._active and self._backend.waits)):
                    break
                self._observe()
                stop.wait(POLL_S if self._active else 0)
            self.was_stopped = stop.is_set()
            if self.was_stopped:
                self._backend.stop()
        self._on_change()
        return {number: state_of(trial) for number, trial in self._trials.items()}

    # --------------------------------------------------------------------------------- begin

    def _start(self, queue: list[Trial], stop: threading.Event) -> bool:
        """Start as many as there is room for, none once a stop is requested; whether there was one.

        A stop while folders are made leaves them for whoever goes on with the sweep.
        """
        slots = self._backend.slots
        free = ANY_NUMBER if slots is None else slots - len(self._active)
        batch = queue[:free] if free > 0 else []
        del queue[: len(batch)]
        if free > len(batch) and not self._search.finished:
            batch += self._propose(free - len(batch))
        ready = [trial for trial in batch if not stop.is_set() and self._is_ready(trial)]
        if stop.is_set():
            return True
        for trial in ready:
            self._log(f"\ntrial {trial.number}: {self._name(trial)}")
            self._starts[trial.number] = self._starts.get(trial.number, 0) + 1
            self._followers.setdefault(trial.number, RowFollower(trial.folder / "metrics.jsonl"))
        if ready:
            self._active |= {trial.number for trial in ready}
            self._backend.start(ready)
            self._on_change()
        return bool(batch)

    def _propose(self, free: int) -> list[Trial]:
        """New trials, which are on the disk before anything of them is made."""
        first = max(self._trials, default=-1) + 1
        trials = [
            Trial(number, each.overrides, trial_folder(self._sweep.folder, number), each.extra)
            for number, each in enumerate(self._search.ask(free), first)
        ]
        if trials:
            append_trials(self._sweep.folder, trials)
            self._trials |= {trial.number: trial for trial in trials}
        return trials

    def _is_ready(self, trial: Trial) -> bool:
        """Whether the trial has a run folder now; one that cannot have one has failed."""
        if is_frozen(trial):
            return True
        clear_partial(trial)
        try:
            self._freeze(trial)
        except PosttrainError as error:
            self._log(f"\ntrial {trial.number}: {self._name(trial)}\nerror: {error}")
            record_failure(trial, BAD_CONFIG, error)
            self._tell(trial)
            self._refused.append(str(error))
            self._refuse_all(error)
            return False
        return True

    def _refuse_all(self, error: PosttrainError) -> None:
        """End a sweep whose first trials all cannot begin, for the same reason.

        Raises:
            PosttrainError: that reason.
        """
        alike = self._refused[-ALIKE:]
        if self._starts or len(alike) < ALIKE or len(set(alike)) > 1:
            return
        raise PosttrainError(
            f"the first {ALIKE} trials all cannot begin: {error.what}",
            where=error.where,
            fix=f"{error.fix}; then `posttrain run {self._sweep.folder} --failed`, or a new sweep",
        )

    def _name(self, trial: Trial) -> str:
        """What it does not share with the others."""
        own = [text for text in trial.overrides if text not in self._sweep.shared]
        return " ".join(own) or "as typed"

    # ------------------------------------------------------------------------------ meanwhile

    def _observe(self) -> None:
        """Hand the search what running trials measured, and stop those that it gives up."""
        for number in self._active:
            trial = self._trials[number]
            for step, value in self._new_values(number):
                pruned = self._search.observe(trial, step, value)
                if pruned and not (trial.folder / PRUNED).exists():
                    self._log(f"trial {number}: given up at step {step}")
                    write_atomic(trial.folder / PRUNED, f"step {step}\n", to_disk=True)
            # Also where the driver was killed between the two.
            if (trial.folder / PRUNED).exists() and not (trial.folder / "STOP").exists():
                write_atomic(trial.folder / "STOP", "pruned\n")

    def _new_values(self, number: int) -> Iterator[tuple[int, float]]:
        for row in self._followers[number].read():
            value = row.get(self._sweep.metric)
            if value is None and TOTAL in row:
                self._refuse_metric(row)
            if isinstance(value, int | float):
                self._values[number] = float(value)
                yield row["step"], float(value)

    def _refuse_metric(self, row: Mapping[str, Any]) -> None:
        """The evaluation before the first step says already what a run measures.

        Raises:
            ConfigError: it has not what the sweep looks for; what runs saves and leaves first.
        """
        self._backend.stop()
        found = [key for key in row if key.startswith((TOTAL, CHANNEL))]
        raise ConfigError(
            f"is {self._sweep.metric}, which no run of this sweep measures",
            where="hydra.sweeper.metric",
            fix=f"set it to one of {', '.join(sorted(found))}",
        )

    # ------------------------------------------------------------------------------------ end

    def _take_in_ends(self, queue: list[Trial]) -> None:
        running = self._backend.running() if self._active else set()
        for number in sorted(self._active - running):
            self._active.remove(number)
            trial = self._trials[number]
            for step, value in self._new_values(number):
                self._search.observe(trial, step, value)
            if self._is_to_start_again(trial):
                self._log(f"trial {number}: its process was lost; started again")
                queue.insert(0, trial)
            else:
                self._tell(trial)
            self._on_change()

    def _is_to_start_again(self, trial: Trial) -> bool:
        """Whether a trial that ended is to go on; one that failed is recorded as such."""
        state, code = state_of(trial), self._backend.code(trial.number)
        if state in (State.done, State.pruned, State.running):
            return False
        stopped = code == STOPPED or (code is None and was_stopped(trial.folder))
        if stopped:
            return False
        lost = code is None or code < 0 or code in (Exit.requeue, Exit.saved)
        # One that a driver had begun that was killed is tried once by us, whatever became of it:
        # it may have failed for that, its Ray having gone with the driver.
        budget = self._backend.retries + (code is None)
        if lost and self._starts[trial.number] <= budget:
            return True
        record_failure(trial, FAILED if code is None else code)
        return False

    def _tell(self, trial: Trial) -> None:
        """Hand the search how a trial ended."""
        state = state_of(trial)
        if trial.number not in self._values:
            self._followers.setdefault(trial.number, RowFollower(trial.folder / "metrics.jsonl"))
            for step, value in self._new_values(trial.number):
                self._search.observe(trial, step, value)
        last = self._values.get(trial.number)
        if state.is_end:
            self._search.tell(trial, state, last)
        shown = "" if last is None else f", {self._sweep.metric} {last:.4f}"
        if trial.number in self._starts:
            self._log(f"trial {trial.number}: {state.value}{shown}")


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """Set by the first signal that asks to stop; a second Ctrl-C raises.

    A hang-up that was ignored when we started (`nohup`) stays ignored.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, _: FrameType | None) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    held: list[Any] = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        held.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in held}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
