"""The job script of an array: which run each of its tasks drives."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from posttrain_launch.batch.array import index_list, render_array

from posttrain_dist.config import RunConfig, Slurm, complete


@pytest.mark.parametrize(
    ("numbers", "at_once", "expected"),
    [
        (range(6), None, "0-5"),
        (range(6), 2, "0-5%2"),
        ([0], 4, "0%4"),
        ([7, 1, 3, 4, 5], 2, "1,3-5,7%2"),
    ],
)
def test_the_list_of_indices(numbers, at_once, expected):
    assert index_list(list(numbers), at_once) == expected


@pytest.fixture
def script(tmp_path: Path) -> tuple[Path, str]:
    folder = tmp_path / "a sweep 100%"
    for number in (0, 3, 12):
        (folder / f"trial-{number:03d}" / "logs").mkdir(parents=True)
    cluster = Slurm(nodes=2, gpus_per_node=0, time="00:10:00", setup=["module list"])
    config = complete(RunConfig(cluster=cluster))
    return folder, render_array(config, "sweep-1", folder, [0, 3, 12], 2)


def test_each_task_is_the_job_of_a_trial(script):
    folder, text = script
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if "#SBATCH" in line]
    assert "--array=0,3,12%2" in options
    assert "--nodes=2" in options
    assert "--job-name=sweep-1" in options
    # In one folder for all: the log of each is told by %a, three digits as the folders have.
    where = str(folder).replace("%", "%%")
    assert f'--output="{where}/trial-%3a/logs/slurm-%A_%a.log"' in options
    assert f'--chdir="{folder}"' in options

    head = text[: text.index("site_modules=")]
    for number in (0, 3, 12):
        done = subprocess.run(
            ["bash", "-euc", head + '\necho "$POSTTRAIN_RUN $POSTTRAIN_JOB"'],
            env={
                "SLURM_ARRAY_JOB_ID": "77",
                "SLURM_ARRAY_TASK_ID": str(number),
                "PATH": "/usr/bin:/bin",
            },
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{folder}/trial-{number:03d} 77_{number}\n"
    setup = next(line for line in text.splitlines() if line.startswith("site_setup="))
    assert setup == """site_setup=('cd "$POSTTRAIN_RUN"' 'module list')"""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shellcheck_finds_nothing(script):
    # SC2016: lines of setup stand in single quotes, and are expanded in the job.
    done = subprocess.run(
        ["shellcheck", "-x", "--exclude=SC2016", "-"],
        input=script[1],
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""
