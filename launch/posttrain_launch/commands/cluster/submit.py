"""`posttrain submit`: freeze a run and send it to Slurm, or to a Ray that runs."""

from __future__ import annotations

from posttrain_dist.config import Ray, Slurm
from posttrain_dist.report.run.plan_section import write_run_plan
from posttrain_dist.report.run.read import read_run
from posttrain_launch.batch.submit import submit
from posttrain_launch.compose.hydra_app import compose_command, read_command_line
from posttrain_launch.run.driver import read_frozen
from posttrain_launch.run.freeze import freeze


def command(arguments: list[str], debug: bool) -> int:
    """Make the run folder, write its job, and submit that unless it is a dry run."""
    line = read_command_line("submit", arguments, debug)
    composed = compose_command(line)
    cluster = composed.config.cluster
    if isinstance(cluster, Ray) and not isinstance(cluster, Slurm):
        from posttrain_launch.ray.jobs.sending import send

        return send(composed, line.typed, force=line.force, dry_run=line.dry_run, wait=line.wait)
    folder = freeze(composed, line.typed, force=line.force)
    write_run_plan(read_run(folder))  # to be looked at while the job waits
    submit(read_frozen(folder), folder, line.dry_run)
    return 0
