"""What a job script calls when its driver has ended: what is to be done now.

python -P -m posttrain_launch.lifecycle.after RUN --code N --signal USR1 --state "$(scontrol …)"

It prints one line, ACTION CODE: what `decide` says, and the exit code of the job. The reason goes
to standard error. It closes the start of the run in logs/starts.jsonl: the script knows what the
driver may not, that Ray's step ended first, or what Slurm is about to do with the job.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from posttrain_dist.config import RunConfig
from posttrain_launch.lifecycle import starts
from posttrain_launch.lifecycle.decide import Action, Cause, Decision
from posttrain_launch.lifecycle.exit_codes import Exit

_OF_CODE = {
    int(Exit.finished): Cause.failed,  # and no FINISHED
    int(Exit.failed): Cause.failed,
    int(Exit.bad_config): Cause.bad_config,
    int(Exit.requeue): Cause.ray_lost,
    int(Exit.saved): Cause.time_limit,
    int(Exit.stopped): Cause.stopped,
}
NO_COMMAND = (126, 127)  # of shell: there is no `posttrain`, or it cannot run


def cause_in_slurm(
    written: Cause | None,
    code: int,
    *,
    signal: str = "none",
    ray_ended: bool = False,
    state: str = "",
    restart_count: int = 0,
) -> Cause:
    """Why the processes of a start ended, from all that is known.

    Args:
        written: what the driver wrote; None: nothing, it was killed.
        code: of the driver, as shell has it.
        signal: that the job script had: USR1, TERM or none.
        ray_ended: the step of Ray ended before the driver.
        state: what `scontrol show job` says of the job; "": nothing.
        restart_count: of this start.
    """
    slurm = dict(re.findall(r"(\w+)=(\S+)", state))
    if written in (Cause.stopped, Cause.bad_config):
        return written
    if slurm.get("JobState") == "CANCELLED":
        return Cause.stopped
    if int(slurm.get("Restarts", "0") or 0) > restart_count:
        return Cause.requeued
    if slurm.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"):
        return Cause.preempted
    if written is Cause.preempted:  # TERM that came to the steps, and Slurm says nothing of it
        return Cause.requeued if signal == "TERM" else Cause.time_limit
    if written in (None, Cause.failed) and (ray_ended or slurm.get("JobState") == "NODE_FAIL"):
        return Cause.ray_lost
    if written is not None:
        return written
    known = Cause.failed if code in NO_COMMAND else _OF_CODE.get(code)
    if known is None and signal == "USR1":
        return Cause.time_limit  # it was killed before it could save, or while it did
    return known or Cause.killed


def close_start(run_folder: Path, code: int, signal: str, ray_ended: bool, state: str) -> Decision:
    """Close the newest start of this job, and decide."""
    if (run_folder / "FINISHED").is_file():
        return Decision(Action.end, "finished", int(Exit.finished))
    job = starts.this_job()
    rows = [row for row in starts.read(run_folder) if row["job"] == job.id]
    own = [row for row in rows if row["restart_count"] == job.restart_count]
    # A driver that never came so far has written nothing: the script opens its start.
    row = own[-1] if own else None
    number = row["start"] if row is not None else starts.begin(run_folder, job)
    written = Cause(row["cause"]) if row is not None and "cause" in row else None
    cause = cause_in_slurm(
        written,
        code,
        signal=signal,
        ray_ended=ray_ended,
        state=state,
        restart_count=job.restart_count,
    )
    config = RunConfig.from_yaml((run_folder / "config.yaml").read_text(encoding="utf-8"))
    return starts.close(run_folder, number, code, cause, starts.policy_of(config))


def main(arguments: list[str] | None = None) -> None:
    """Decide, and print the action."""
    parser = argparse.ArgumentParser(description="What follows when the driver of a job ended.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--code", type=int, required=True, help="exit code of the driver")
    parser.add_argument("--signal", default="none", help="that the job script had")
    parser.add_argument("--ray-ended", action="store_true", help="Ray's step ended first")
    parser.add_argument("--state", default="", help="what scontrol show job says")
    given = parser.parse_args(arguments)
    decision = close_start(given.run_folder, given.code, given.signal, given.ray_ended, given.state)
    print(decision.reason, file=sys.stderr)
    print(decision.action, decision.code)


if __name__ == "__main__":
    main()
