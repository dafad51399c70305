"""Drive a sweep from its folder, at its first start and at every later one."""

from __future__ import annotations

from pathlib import Path

from posttrain_dist.files import write_atomic
from posttrain_dist.report.sweep import write_sweep_page
from posttrain_launch.failures import FAILED, STOPPED
from posttrain_launch.sweep.folder import PAGE, State, Sweep, driving, read_sweep, read_trials
from posttrain_launch.sweep.kinds import backend_module, search_module
from posttrain_launch.sweep.loop import Loop
from posttrain_launch.sweep.results import read_results
from posttrain_launch.sweep.states import forget_failure
from posttrain_launch.sweep.table import results_text, table_text
from posttrain_launch.sweep.trial_run import freezing


def drive_sweep(
    folder: Path, *, resumed: bool = True, failed_too: bool = False, debug: bool = False
) -> int:
    """Start, or go on with, the sweep of a folder, and print its table at the end.

    Args:
        resumed: its folder was not made just now.
        failed_too: also start its failed trials again.
        debug: have the trials show the stack trace of an error.

    Returns:
        The exit code: 0 every trial was run or given up, 1 one failed, 130 stopped.

    Raises:
        PosttrainError: it is no sweep, or another process drives it.
    """
    sweep = read_sweep(folder)
    with driving(sweep.folder):
        if failed_too:
            for trial in read_trials(sweep.folder):
                forget_failure(trial)
        states = _drive(sweep, resumed=resumed, debug=debug)
    print(f"\n{results_text(read_results(sweep))}", flush=True)
    found = set(states.values())
    if found & {State.stopped, State.waiting, State.running}:
        leaves = not resumed and sweep.backend.get("wait") is False
        print(f"\nnot all of it is done; go on with: posttrain run {sweep.folder}")
        return 0 if leaves else STOPPED
    return FAILED if State.failed in found else 0


def _drive(sweep: Sweep, *, resumed: bool, debug: bool) -> dict[int, State]:
    kind = sweep.backend["kind"]
    options = {key: value for key, value in sweep.backend.items() if key != "kind"}
    module = backend_module(kind)
    if resumed and "wait" in options:
        options["wait"] = True  # whoever comes back wants to see it
    backend = module.restore(sweep, options, debug=debug)
    search = search_module(sweep.search["kind"]).restore(sweep)

    def write_table() -> None:
        results = read_results(sweep)
        write_atomic(sweep.folder / "trials.txt", table_text(results) + "\n")
        write_sweep_page(sweep.folder / PAGE, results)

    print(f"sweep: {sweep.folder}", flush=True)
    try:
        prepare, make_adjust = (getattr(module, name, None) for name in ("prepare", "adjust"))
        with freezing(sweep, prepare, make_adjust and make_adjust(options)) as freeze:
            loop = Loop(sweep, backend, search, freeze, _log, write_table)
            return loop.run()
    finally:
        backend.close()


def _log(line: str) -> None:
    print(line, flush=True)
