"""The job script of a run, whole and readable; it stays in the run folder as job.sbatch.

#SBATCH lines, variables and arrays, and the shell of `slurm/`.
"""

from __future__ import annotations

import importlib.resources
import shlex
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain_dist.config import RunConfig, Slurm
from posttrain_launch.batch.container import command_prefix, srun_options
from posttrain_launch.batch.job_options import options, signal_lead

# Of slurm/, in this order.
PARTS = ("site", "environment", "preflight", "ray_steps", "life_cycle")


def render(config: RunConfig, run_folder: Path) -> str:
    """The text of the job script; `config.cluster` is Slurm."""
    cluster = config.cluster
    assert isinstance(cluster, Slurm)
    lead_s, source = signal_lead(config, run_folder)
    header = options(config.name, cluster, run_folder, lead_s=lead_s)
    return script(
        header,
        variables(config, run_folder),
        arrays(config, run_folder),
        lead_line(cluster, lead_s, source),
    )


def variables(config: RunConfig, run_folder: Path) -> dict[str, str]:
    """The variables that the parts of a script read: name -> value, as shell has it."""
    cluster = config.cluster
    assert isinstance(cluster, Slurm)
    # An image has programs of its own.
    programs = "" if cluster.container else sysconfig.get_path("scripts")
    values = {
        "POSTTRAIN_RUN": str(run_folder),
        "POSTTRAIN_BIN": programs,
        "POSTTRAIN_INTERFACE": cluster.network_interface or "",
        "POSTTRAIN_PREFLIGHT": str(int(cluster.preflight)),
        "POSTTRAIN_PREFLIGHT_DEADLINE": str(cluster.preflight_deadline_s),
        "POSTTRAIN_EXCLUDE_BAD_NODES": str(int(cluster.exclude_bad_nodes)),
        "POSTTRAIN_START_DEADLINE_S": str(cluster.start_deadline_s),
    }
    if cluster.container:
        values["TMPDIR"] = "/tmp"
    return {name: shlex.quote(value) for name, value in values.items()}


def arrays(config: RunConfig, run_folder: Path) -> dict[str, list[str]]:
    """The arrays that the parts of a script read: name -> words."""
    cluster = config.cluster
    assert isinstance(cluster, Slurm)
    return {
        "site_modules": cluster.modules,
        "site_setup": cluster.setup,
        "srun_options": srun_options(config, run_folder),
        "wrap": command_prefix(config, run_folder),
    }


def lead_line(cluster: Slurm, lead_s: float, source: str) -> str:
    """How a run ends at the time limit, as one comment of the script."""
    own = [each for each in cluster.extra if each.startswith("--signal")]
    if own:
        return f"At the signal of cluster.extra ({own[-1]}) the run saves and ends."
    then = "ends and is queued again" if cluster.requeue else "ends"
    return f"{lead_s:.0f} s before the time limit ({source}) the run saves, {then}."


def script(
    sbatch_options: Sequence[str],
    variables: Mapping[str, str],
    arrays: Mapping[str, Sequence[str]] | None = None,
    comment: str = "",
    parts: Sequence[str] = PARTS,
) -> str:
    """A job script: #SBATCH lines, what its parts read, and the parts.

    Args:
        variables: name -> its value as shell has it, quoted or to be expanded; see `variables`.
        arrays: name -> words, taken as they are; see `arrays`.
        comment: a line of the head.
        parts: of slurm/, in their order.
    """
    words = {"site_modules": [], "site_setup": [], "srun_options": [], "wrap": [], **(arrays or {})}
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in sbatch_options),
        "",
        "# Written by `posttrain submit`; may be sent again with sbatch.",
        *([f"# {comment}"] if comment else []),
        *(f"export {name}={value}" for name, value in variables.items()),
        *(f"{name}=({' '.join(map(_word, each))})" for name, each in words.items()),
        "",
    ]
    folder = importlib.resources.files("posttrain_launch.slurm")
    texts = [folder.joinpath(f"{name}.sh").read_text("utf-8") for name in parts]
    return "\n".join([*lines, *(text.removeprefix("#!/bin/bash\n") for text in texts)])


def _word(text: str) -> str:
    """A word of an array; one with a comma in quotes, for that is no list to bash."""
    return f"'{text}'" if "," in text and shlex.quote(text) == text else shlex.quote(text)
