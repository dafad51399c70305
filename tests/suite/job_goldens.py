"""The heads of job scripts that presets give, beside the words of their command lines.

    python tests/suite/job_goldens.py

writes tests/launch/batch/golden/*.sbatch; look at the difference before you commit it.
"""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path

from posttrain_launch.batch.job_script import render
from posttrain_launch.compose.composer import Composer
from posttrain_launch.compose.paths import with_absolute_paths
from posttrain_launch.compose.problems import compose_checked

from posttrain_dist.config import RunConfig, complete

FOLDER = Path(__file__).resolve().parent.parent / "launch" / "batch" / "golden"
RUN = Path("/cluster/runs/mine/20260101-120000")
PARTS_BEGIN = "# What this site wants before anything of ours runs."
ON_GPUS = ["cluster.nodes=2", "cluster.gpus_per_node=4", "cluster.time='08:00:00'"]
ON_CPUS = ["cluster.nodes=2", "cluster.cpus_per_node=16", "cluster.time='08:00:00'"]
# A preset, or a use of one: its words.
WORDS: dict[str, list[str]] = {
    "slurm": ["cluster=slurm", *ON_GPUS],
    "slurm_gres": ["cluster=slurm_gres", *ON_GPUS, "cluster.gpu_type=h100"],
    "slurm_no_requeue": ["cluster=slurm_no_requeue", *ON_GPUS],
    "slurm_cpu": ["cluster=slurm_cpu", *ON_CPUS],
    "slurm_exclusive": ["cluster=slurm_exclusive", *ON_GPUS],
    "slurm_spare_nodes": ["cluster=slurm_spare_nodes", *ON_GPUS],
    "slurm_apptainer": [
        "cluster=slurm_apptainer",
        *ON_GPUS,
        "cluster.container=/images/posttrain.sif",
        "cluster.container_mounts=[/scratch]",
        "model.path=/models/M",
        "data.train=/data/chat/*.jsonl",
    ],
    "pyxis": [
        "cluster=slurm",
        *ON_GPUS,
        "cluster.container=/images/posttrain.sqsh",
        'cluster.container_mounts=["/data:/mnt:ro"]',
        "model.path=/models/M",
    ],
    "every_option": [
        "cluster=slurm",
        *ON_GPUS,
        "cluster.memory_per_node=64G",
        "cluster.partition=gpu",
        "cluster.account=lab",
        "cluster.qos=high",
        'cluster.constraint="a100&ib"',
        'cluster.exclude=["node[7-8]",node12]',
        "cluster.reservation=course",
        "cluster.mail=me@example.org",
        "cluster.modules=[gcc/13.2,cuda/12.8]",
        'cluster.setup=["source /shared/env/bin/activate"]',
        "cluster.network_interface=ib0",
        "cluster.preflight=false",
        'cluster.extra=["--nice=100"]',
    ],
}


def config_of(name: str) -> RunConfig:
    """The configuration of a row of `WORDS`, as it is frozen but for the run's own folder."""
    with Composer() as composer:
        composed = compose_checked(composer, [*WORDS[name], "name=mine"])
    config = complete(with_absolute_paths(composed.config))
    return dataclasses.replace(config, output_root=str(RUN.parent.parent))


def script_of(name: str) -> str:
    """Its whole job script, with the folder of this machine's programs as /programs."""
    text = render(config_of(name), RUN)
    return text.replace(sysconfig.get_path("scripts"), "/programs")


def head(script: str) -> str:
    """What is the job's own: above the shell that all scripts have."""
    return script[: script.index(PARTS_BEGIN)]


if __name__ == "__main__":
    for name in WORDS:
        (FOLDER / f"{name}.sbatch").write_text(head(script_of(name)))
