"""Every preset's job script is the one that is kept in golden/, and clean shell."""

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import job_goldens
import pytest
from posttrain_launch.batch.job_script import PARTS

CONF = Path(__file__).resolve().parents[3] / "conf" / "cluster"


@pytest.mark.parametrize("name", job_goldens.WORDS)
def test_the_head_of_a_script_is_the_kept_one(name):
    kept = (job_goldens.FOLDER / f"{name}.sbatch").read_text()
    script = job_goldens.script_of(name)
    assert job_goldens.head(script) == kept, (
        "where that is meant: python tests/suite/job_goldens.py writes golden/ again"
    )
    shell = [
        files("posttrain_launch.slurm").joinpath(f"{part}.sh").read_text().partition("\n")[2]
        for part in PARTS
    ]
    assert script[len(kept) :] == "\n".join(shell)


def test_each_preset_of_slurm_has_a_kept_script():
    presets = {path.stem for path in CONF.glob("slurm*.yaml")}
    assert presets <= job_goldens.WORDS.keys()
    assert {p.stem for p in job_goldens.FOLDER.glob("*.sbatch")} == job_goldens.WORDS.keys()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_are_clean_shell(tmp_path):
    whole = tmp_path / "job.sbatch"
    whole.write_text(job_goldens.script_of("every_option"))
    done = subprocess.run(["shellcheck", whole], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    # The others differ above the parts alone, which use the arrays that stand there.
    heads = [job_goldens.FOLDER / f"{name}.sbatch" for name in job_goldens.WORDS]
    command = ["shellcheck", "--exclude=SC2034", *heads]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
