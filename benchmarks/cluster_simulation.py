"""What the life cycle costs over years of a cluster: time limits, failures, saves on one storage.

    pip install 'posttrain-dist[dev]' && python benchmarks/cluster_simulation.py [--days 100000]

Discrete events: JOBS trainings of 64 GPUs each, on one storage, over as many job-days as is given.
The decisions are those of the product, imported: how often to save (`planner.speed.intervals`),
how long before the time limit to stop (`lifecycle.lead`, of the saves that the run measured
itself), and what follows the end of a start (`lifecycle.decide`). The rest is assumed here:

    a failure every 50,000 GPU-hours, without memory, which ends the job at once; it is seen after
    15 s (a Ray node that is powered off, measured)
    a save takes 60 s while at most FULL_SPEED jobs use the storage; more of them share it evenly;
    a start reads as much as a save writes
    24 h limits; a job that is queued again waits for 121 s (Slurm 22.05, measured) and finds nodes
    26 s from the start of a job to its first step, the reading apart (the `ray_cold` arm of
    launch.py, measured)
    a step takes 12 s, an evaluation between two steps 60 s and one every 2 h is part of the work

Effective time is that of the steps which were kept, as a share of all: waiting, starting, saving
and lost work are the rest.

The yardstick. A start is a renewal: it begins with all work saved, and ends either as planned, D
after its nodes were there, or by a failure at an exponential time X of mean M. It first reads and
starts (B), then trains in stretches of tau, each with a save C behind it; the planned end has a
save of its own and takes T to clear up, and H passes until the next start. With q_k = exp(-(B +
k (tau + C)) / M), the probability of reaching the end of the k-th save, n = floor((D - B) / (tau +
C)) and p = exp(-(D + C) / M):

    E[kept] = p (D - B - n C) + tau sum_{k=1..n} (q_k - p)
    E[time] = M (1 - p) + p T + (1 - p) F + H          F: until a failure is seen

and the share of a long run is E[kept] / E[time], exactly. Its optimum is the largest over tau, for
the D of a perfect forecast, L - C - T: the last save ends as the limit comes. Without limits this
is Young's and Daly's.

Writes one row an arm to benchmarks/results/cluster_simulation.jsonl.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import rows
from posttrain_launch.lifecycle.decide import Action, Cause, Policy, Start, next_action
from posttrain_launch.lifecycle.exit_codes import Exit
from posttrain_launch.lifecycle.lead import FLOOR_S, TEARDOWN_S, stop_lead_s, within_limit

from posttrain_dist.checkpoint.save_times import KEPT
from posttrain_dist.planner.speed.intervals import checkpoint_interval

HOUR, DAY = 3600.0, 86400.0
JOBS = 16
FULL_SPEED = 4
HISTORY = 20  # newest starts that a decision looks at; each of them is older than any progress


@dataclass(frozen=True, slots=True)
class World:
    """What is assumed; times in seconds."""

    gpus: int = 64
    failure_gpu_hours: float = 50_000.0
    save_s: float = 60.0
    limit_s: float = DAY
    hold_s: float = 121.0
    boot_s: float = 26.0
    detect_s: float = 15.0
    step_s: float = 12.0
    pause_s: float = 60.0

    @property
    def failure_s(self) -> float:
        """M, the mean time between two failures of a job."""
        return self.failure_gpu_hours * HOUR / self.gpus


LeadRule = Callable[[list[float], World], float]


def product_lead(saves: list[float], world: World) -> float:
    """As the driver has it: from the newest saves of the run, else from its plan."""
    planned_s = max(FLOOR_S, stop_lead_s(world.save_s, world.step_s))
    if saves:
        planned_s = stop_lead_s(max(saves[-KEPT:]), world.step_s, pause_s=world.pause_s)
    return within_limit(planned_s, world.limit_s)


@dataclass(frozen=True, slots=True)
class Choices:
    """What the product decides, or what stands in its place in an arm that shows its worth."""

    lead: LeadRule = product_lead
    interval_s: float | None = None  # between saves; None: the planner's
    policy: Policy = field(default_factory=Policy)

    def save_every(self, world: World) -> int:
        """Steps between two saves."""
        interval_s = self.interval_s or checkpoint_interval(world.save_s, world.failure_s)
        return max(1, round(interval_s / world.step_s))


# ------------------------------------------------------------------------------- closed form


def expected_share(world: World, interval_s: float, lead_s: float) -> float:
    """Share of the time that is kept, by the formula above; no storage is shared in it.

    Args:
        interval_s: tau, of training between two saves.
        lead_s: from the beginning of the last save to the time limit.
    """
    mean, save = world.failure_s, world.save_s
    begin, planned = world.boot_s + world.save_s, world.limit_s - lead_s
    count = math.floor((planned - begin) / (interval_s + save))
    end = math.exp(-(planned + save) / mean)
    reached = [math.exp(-(begin + k * (interval_s + save)) / mean) for k in range(1, count + 1)]
    kept = end * (planned - begin - count * save) + interval_s * sum(q - end for q in reached)
    fails = -math.expm1(-(planned + save) / mean)
    spent = mean * fails + end * TEARDOWN_S + fails * world.detect_s + world.hold_s
    return kept / spent


def optimum(world: World) -> tuple[float, float]:
    """The largest share, and the interval that has it, of all intervals of whole steps."""
    lead_s = world.save_s + TEARDOWN_S
    longest = round((world.limit_s - lead_s) / world.step_s)
    intervals = (steps * world.step_s for steps in range(1, longest + 1))
    return max((expected_share(world, each, lead_s), each) for each in intervals)


# ------------------------------------------------------------------------------------ events


@dataclass(slots=True)
class Job:
    """One training, between two events."""

    phase: str = "queued"  # queued, boot, read, train, save, ended
    version: int = 0  # events of an older one are void
    began: float = 0.0  # this start had its nodes
    step: int = 0
    saved: int = 0
    saved_before: int = 0
    stretch: int = 0  # steps to the next save
    save_began: float = 0.0
    fails: float = math.inf
    stops: float = math.inf
    saves: list[float] = field(default_factory=list)
    history: list[Start] = field(default_factory=list)
    progress: float = 0.0  # when `saved` last rose, or the job first began


@dataclass(slots=True)
class Tally:
    """What came of a simulation; times in seconds."""

    elapsed_s: float = 0.0
    kept_s: float = 0.0
    starts: int = 0
    failures: int = 0
    saves: int = 0
    saves_cut: int = 0  # at the time limit
    longest_save_s: float = 0.0
    longest_standstill_s: float = 0.0  # between two checkpoints
    ended: list[str] = field(default_factory=list)  # reasons, of jobs that did not go on

    @property
    def effective(self) -> float:
        """Share of the time that was kept."""
        return self.kept_s / self.elapsed_s


class Simulation:
    """The jobs, their storage, and the clock."""

    def __init__(self, world: World, choices: Choices, jobs: int, seed: int) -> None:
        self.world, self.choices = world, choices
        self.draw = random.Random(seed)
        self.every = choices.save_every(world)
        self.now = 0.0
        self.jobs = [Job() for _ in range(jobs)]
        self.tally = Tally()
        self._events: list[tuple[float, int, int, int, str]] = []
        self._order = itertools.count()
        self._left: dict[int, float] = {}  # job that uses the storage -> seconds of full speed
        self._rate, self._moved = 1.0, 0.0

    def run(self, days: float) -> Tally:
        """Simulate so many days of each job."""
        end = days * DAY
        for number in range(len(self.jobs)):  # spread over a day, as people send them
            self.jobs[number].progress = self.draw.uniform(0, self.world.limit_s)
            self.tally.elapsed_s += end - self.jobs[number].progress
            self._at(self.jobs[number].progress, number, "begin")
        while self._events:
            when, _, number, version, what = heapq.heappop(self._events)
            if when > end:
                break
            if version == self.jobs[number].version:
                self.now = when
                getattr(self, f"_{what}")(number, self.jobs[number])
        for job in self.jobs:
            self.tally.kept_s += job.saved * self.world.step_s
            standstill = end - job.progress if job.phase != "ended" else 0.0
            self.tally.longest_standstill_s = max(self.tally.longest_standstill_s, standstill)
        return self.tally

    def _at(self, when: float, number: int, what: str) -> None:
        event = (when, next(self._order), number, self.jobs[number].version, what)
        heapq.heappush(self._events, event)

    def _enter(self, number: int, phase: str, after_s: float, what: str) -> None:
        """Begin a phase that ends by `what`, unless a failure or the limit comes before."""
        job = self.jobs[number]
        job.phase, job.version = phase, job.version + 1
        limit = job.began + self.world.limit_s
        when, what = min((self.now + after_s, what), (job.fails, "fail"), (limit, "limit"))
        self._at(when, number, what)

    # --- a start

    def _begin(self, number: int, job: Job) -> None:
        self.tally.starts += 1
        job.began, job.saved_before, job.step = self.now, job.saved, job.saved
        job.fails = self.now + self.draw.expovariate(1 / self.world.failure_s)
        lead_s = self.choices.lead(job.saves, self.world)
        job.stops = self.now + self.world.limit_s - lead_s
        self._enter(number, "boot", self.world.boot_s, "booted")

    def _booted(self, number: int, job: Job) -> None:
        self._transfer(number, "read")

    def _train(self, number: int, job: Job) -> None:
        """To the next save, or to the end of the step in which the stop comes."""
        world = self.world
        due = (job.step // self.every + 1) * self.every - job.step
        left = max(0, math.ceil((job.stops - self.now) / world.step_s))
        job.stretch = min(due, left)
        self._enter(number, "train", job.stretch * world.step_s, "trained")

    def _trained(self, number: int, job: Job) -> None:
        job.step += job.stretch
        self._transfer(number, "save")

    # --- the storage

    def _transfer(self, number: int, phase: str) -> None:
        self._move()
        self.jobs[number].phase = phase
        self.jobs[number].save_began = self.now
        self._left[number] = self.world.save_s
        self._plan_transfers()

    def _move(self) -> None:
        """Take from every transfer what it got since the last change."""
        for number in self._left:
            self._left[number] -= (self.now - self._moved) * self._rate
        self._moved = self.now

    def _plan_transfers(self) -> None:
        self._rate = min(1.0, FULL_SPEED / max(1, len(self._left)))
        for number, left in self._left.items():
            self._enter(number, self.jobs[number].phase, max(0.0, left) / self._rate, "done")

    def _done(self, number: int, job: Job) -> None:
        """A transfer is complete."""
        phase, took_s = job.phase, self.now - job.save_began
        self._drop(number)
        if phase == "save":
            self._saved(job, took_s)
        if phase == "save" and job.stops <= self.now:
            self._end(number, job, Cause.time_limit, TEARDOWN_S)
        else:
            self._train(number, job)

    def _saved(self, job: Job, took_s: float) -> None:
        tally = self.tally
        tally.saves += 1
        tally.longest_save_s = max(tally.longest_save_s, took_s)
        job.saves = [*job.saves[-KEPT:], took_s]
        if job.step > job.saved:
            standstill_s = self.now - job.progress
            tally.longest_standstill_s = max(tally.longest_standstill_s, standstill_s)
            job.saved, job.progress = job.step, self.now

    def _drop(self, number: int) -> None:
        """Take a job off the storage."""
        if number in self._left:
            self._move()
            del self._left[number]
            self._plan_transfers()

    # --- ends

    def _fail(self, number: int, job: Job) -> None:
        self.tally.failures += 1
        self._end(number, job, Cause.node_failure, self.world.detect_s)

    def _limit(self, number: int, job: Job) -> None:
        self.tally.saves_cut += job.phase == "save"
        self._end(number, job, Cause.time_limit, 0.0)

    def _end(self, number: int, job: Job, cause: Cause, clear_s: float) -> None:
        """Decide what follows a start, as the job script does."""
        self._drop(number)
        job.version += 1
        code = int(Exit.saved if cause is Cause.time_limit else Exit.requeue)
        job.history.append(Start(job.saved_before, job.saved, code, cause))
        del job.history[:-HISTORY]
        decision = next_action(job.history, self.choices.policy)
        if decision.action is Action.end:
            job.phase = "ended"
            self.tally.ended.append(decision.reason)
            return
        job.phase = "queued"
        self._at(self.now + clear_s + self.world.hold_s, number, "begin")


def simulate(world: World, choices: Choices, days: float, jobs: int = JOBS, seed: int = 0) -> Tally:
    """Simulate `days` job-days in all, of `jobs` jobs side by side."""
    return Simulation(world, choices, jobs, seed).run(days / jobs)


# -------------------------------------------------------------------------------------- arms


ARMS = {
    "as it is": (World(), Choices()),
    "lead 0": (World(), Choices(lead=lambda saves, world: 0.0)),
    "a save every hour": (World(), Choices(interval_s=HOUR)),
    "a save every 20 h": (World(), Choices(interval_s=20 * HOUR)),
    "saves of 10 min": (replace(World(), save_s=600.0), Choices()),
    "4 h limits": (replace(World(), limit_s=4 * HOUR), Choices()),
    "10 times the failures": (replace(World(), failure_gpu_hours=5_000.0), Choices()),
    "limits too short to save": (replace(World(), save_s=3000.0, limit_s=HOUR), Choices()),
}


def measure(name: str, days: float, seed: int) -> dict[str, Any]:
    """One row: an arm beside the closed form."""
    world, choices = ARMS[name]
    began = time.process_time()
    tally = simulate(world, choices, days, seed=seed)
    best, best_interval_s = optimum(world)
    interval_s = choices.save_every(world) * world.step_s
    lead_s = choices.lead([world.save_s], world)
    saves_in_time = lead_s >= world.save_s + TEARDOWN_S  # else the formula is of something else
    return {
        "arm": name,
        "job_days": days,
        "seed": seed,
        "effective": tally.effective,
        "closed_form": expected_share(world, interval_s, lead_s) if saves_in_time else None,
        "optimum": best,
        "below_optimum_points": 100 * (best - tally.effective),
        "interval_s": interval_s,
        "best_interval_s": best_interval_s,
        "starts": tally.starts,
        "failures": tally.failures,
        "saves": tally.saves,
        "saves_cut": tally.saves_cut,
        "longest_save_s": tally.longest_save_s,
        "longest_standstill_h": tally.longest_standstill_s / HOUR,
        "ended": len(tally.ended),
        "why_ended": tally.ended[0] if tally.ended else None,
        "cpu_s": time.process_time() - began,
    }


def main() -> None:
    """Simulate each arm, and leave a row of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--days", type=float, default=100_000, help="job-days of an arm")
    parser.add_argument("--arms", default=",".join(ARMS), help="of: " + ", ".join(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    given = parser.parse_args()
    facts = rows.facts(["posttrain-dist"])
    for name in given.arms.split(","):
        row = measure(name, given.days, given.seed)
        rows.append("cluster_simulation", [{**facts, **row}], given.results)
        print(
            f"{name:<26} effective {row['effective']:.3%}  optimum {row['optimum']:.3%}  "
            f"below it {row['below_optimum_points']:.2f} points  starts {row['starts']:,}  "
            f"failures {row['failures']:,}  ended {row['ended']}  {row['cpu_s']:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
