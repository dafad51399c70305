"""What a site wants before anything of ours runs: modules, setup lines, a folder to write to."""

import os
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
from posttrain_launch.batch.job_script import script

# As Environment Modules and Lmod have it: a function of the shell, here with one module.
MODULE = """() {
  [ "$1 $2" = "load cuda/12.8" ] && export CUDA_HOME=/cuda && return 0
  echo "no $2" >&2; return 1
}"""


def site(
    run: Path, deadline_s: int = 30, programs: str = "", **arrays: list[str]
) -> tuple[int, str]:
    """The exit code, and what is printed; `end` where it came so far."""
    variables = {
        "POSTTRAIN_RUN": f"'{run}'",
        "POSTTRAIN_BIN": f"'{programs or sysconfig.get_path('scripts')}'",
        "POSTTRAIN_PREFLIGHT_DEADLINE": str(deadline_s),
        "SLURM_JOB_ID": "7",
    }
    text = script([], variables, arrays, parts=["site"])
    text += '\necho "end ${CUDA_HOME:-} ${MINE:-} $PATH"\n'
    environment = {**os.environ, "BASH_FUNC_module%%": MODULE, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, env=environment, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def test_modules_and_lines_are_there_for_all_that_follows(tmp_path):
    code, said = site(tmp_path, site_modules=["cuda/12.8"], site_setup=['MINE="a  b"', "cd /"])
    assert code == 0, said
    assert f"end /cuda a  b {sysconfig.get_path('scripts')}:" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "ray"]
    assert list((tmp_path / "ray").iterdir()) == []


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"site_modules": ["cuda/99"]}, "error: the module cuda/99 of cluster.modules cannot be"),
        (
            {"site_setup": ["true", "source /no/such/activate"]},
            "error: a line of cluster.setup failed with exit code 1: source /no/such/activate",
        ),
    ],
)
def test_what_fails_ends_the_job_with_its_name(arrays, line, tmp_path):
    code, said = site(tmp_path, **arrays)
    assert code == 1
    assert line in said
    assert "  fix: " in said
    assert "end" not in said.splitlines()[-1]


def test_what_waits_for_ever_ends_in_time(tmp_path):
    began = time.monotonic()
    os.mkfifo(tmp_path / "silent")  # as a file system that does not answer
    code, said = site(tmp_path, deadline_s=1, site_setup=[f"read -r _ <{tmp_path}/silent"])
    assert code == -15  # TERM
    assert "error: cluster.modules and cluster.setup took over 1 s" in said
    assert time.monotonic() - began < 30


def test_a_folder_that_cannot_be_written_ends_the_job(tmp_path):
    folder = tmp_path / "run"
    folder.touch()  # root may write to any folder
    code, said = site(folder)
    assert code == 1
    assert f"error: the run folder cannot be written: {folder}" in said
    assert "set output_root to a folder on storage that all nodes share" in said


def test_programs_that_this_node_does_not_see_are_named(tmp_path):
    code, said = site(tmp_path, programs="/no/env/bin")
    assert code == 1
    assert "error: posttrain is not on this node: there is no /no/env/bin" in said
    scripts = sysconfig.get_path("scripts")
    code, said = site(tmp_path, programs="/no/env/bin", site_setup=[f"PATH={scripts}:$PATH"])
    assert code == 0, said
