"""`posttrain submit`: freeze a run and send it to a cluster, or send the run of a folder again."""

from __future__ import annotations

import shlex
from pathlib import Path

from posttrain_dist.config import Ray, RunConfig, Slurm
from posttrain_dist.errors import ConfigError
from posttrain_dist.report.run.plan_section import write_run_plan
from posttrain_dist.report.run.read import read_run
from posttrain_dist.run import finished_line
from posttrain_launch.batch.follow import follow
from posttrain_launch.batch.submit import refuse_second_job, submit
from posttrain_launch.commands.run.run_overrides import change_job
from posttrain_launch.compose.hydra_app import compose_command, read_command_line
from posttrain_launch.run.driver import read_frozen
from posttrain_launch.run.freeze import freeze

FLAGS = ("--dry-run", "--wait")


def command(arguments: list[str], debug: bool) -> int:
    """Make the run folder, write its job, and submit that unless it is a dry run.

    Where a run folder comes first, that run is sent again, to go on; overrides behind it change
    how its job is made.
    """
    others = [word for word in arguments if word not in FLAGS]
    if others and _names_folder(others[0]):
        return _again(Path(others[0]).expanduser().absolute(), others[1:], arguments)
    line = read_command_line("submit", arguments, debug)
    composed = compose_command(line)
    dry_run, wait = line.dry_run, "--wait" in line.own
    if isinstance(composed.config.cluster, Ray) and not composed.config.cluster.shared_folders:
        from posttrain_launch.ray.jobs.sending import send_text

        return send_text(composed, line.typed, force=line.force, dry_run=dry_run, wait=wait)
    folder = freeze(composed, line.typed, force=line.force)
    write_run_plan(read_run(folder))  # to be looked at while the job waits
    return _send(read_frozen(folder), folder, dry_run=dry_run, wait=wait)


def _names_folder(word: str) -> bool:
    """Whether the first word is a run folder, there or not, and neither override nor flag."""
    if "=" in word or word.startswith(("-", "+")):
        return False
    return "/" in word or Path(word).is_dir()


def _again(folder: Path, overrides: list[str], arguments: list[str]) -> int:
    config, dry_run = read_frozen(folder), "--dry-run" in arguments
    if (folder / "FINISHED").is_file():
        print(finished_line(folder))
        return 0
    if overrides:
        refuse_second_job(folder)
        config = change_job(folder, config, overrides, keep=not dry_run)
    return _send(config, folder, dry_run=dry_run, wait="--wait" in arguments)


def _send(config: RunConfig, folder: Path, *, dry_run: bool, wait: bool) -> int:
    """Send a run by the way of its cluster; the exit code."""
    if not isinstance(config.cluster, Ray):
        raise ConfigError(
            "this run is not set up for jobs",
            where="cluster",
            fix=f"posttrain run {shlex.quote(str(folder))} goes on with it here",
        )
    if not isinstance(config.cluster, Slurm):
        from posttrain_launch.ray.jobs.sending import send_run

        return send_run(config, folder, dry_run=dry_run, wait=wait)
    job_id = submit(config, folder, dry_run)
    return follow(job_id, folder) if wait and job_id is not None else 0
