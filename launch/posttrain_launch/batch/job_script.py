"""The job script of a run, whole and readable; it stays in the run folder as job.sbatch.

#SBATCH lines, a few variables, and the shell of `slurm/`.
"""

from __future__ import annotations

import importlib.resources
import shlex
import sysconfig
from pathlib import Path

from posttrain_dist.config import RunConfig, Slurm
from posttrain_launch.batch.job_options import SIGNAL_BEFORE_END_S, options

# Of slurm/, in this order.
PARTS = ("environment", "preflight", "ray_steps", "life_cycle")


def render(config: RunConfig, run_folder: Path) -> str:
    """The text of the job script; `config.cluster` is Slurm."""
    cluster = config.cluster
    assert isinstance(cluster, Slurm)
    variables = {
        "POSTTRAIN_RUN": shlex.quote(str(run_folder)),
        "POSTTRAIN_BIN": shlex.quote(sysconfig.get_path("scripts")),
        "POSTTRAIN_INTERFACE": shlex.quote(cluster.network_interface or ""),
        "POSTTRAIN_START_DEADLINE_S": str(cluster.start_deadline_s),
    }
    return script(options(config.name, cluster, run_folder), variables)


def script(sbatch_options: list[str], variables: dict[str, str]) -> str:
    """A job script: #SBATCH lines, the variables that its parts read, and the parts.

    Args:
        variables: name -> its value as shell has it, quoted or to be expanded.
    """
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in sbatch_options),
        "",
        "# Written by `posttrain submit`; may be sent again with sbatch.",
        f"# {SIGNAL_BEFORE_END_S} s before the time limit the run saves, ends and is queued again.",
        "# Where a step and a checkpoint take longer: cluster.extra=['--signal=B:USR1@600'].",
        *(f"export {name}={value}" for name, value in variables.items()),
        "srun_options=()",
        "wrap=()",
        "",
    ]
    folder = importlib.resources.files("posttrain_launch.slurm")
    parts = [folder.joinpath(f"{name}.sh").read_text("utf-8") for name in PARTS]
    return "\n".join([*lines, *(part.removeprefix("#!/bin/bash\n") for part in parts)])
