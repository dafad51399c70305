"""`posttrain submit RUN`: a run that is there is sent again, perhaps by another way."""

from pathlib import Path

import pytest
import yaml
from posttrain_launch.cli import main

WORDS = ["model.path=tiny_base", "cluster=slurm_cpu", "cluster.time=00:10:00", "train.steps=2"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", *WORDS, "--dry-run"]) == 0
    capsys.readouterr()
    [folder] = (tmp_path / "outputs" / "run").iterdir()
    return folder


def test_the_way_of_a_job_can_be_changed_and_the_run_cannot(run, capsys):
    before = (run / "config.yaml").read_text()
    words = ["cluster.time=00:20:00", "cluster.partition=long"]
    assert main(["submit", str(run), *words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "#SBATCH --time=00:20:00\n#SBATCH --partition=long\n" in printed
    assert (run / "config.yaml").read_text() == before  # it was a dry run
    assert main(["submit", "--dry-run", str(run)]) == 0
    assert "#SBATCH --time=00:10:00\n" in capsys.readouterr().out
    assert main(["submit", str(run), "train.steps=5", "cluster.nodes=2"]) == 2
    printed = capsys.readouterr().err
    assert "train.steps: is fixed when a run is made" in printed
    assert "cluster.nodes: is fixed when a run is made" in printed
    assert main(["submit", str(run), "cluster.qos='a b'"]) == 2
    assert "cluster.qos: is 'a b'" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before


def test_a_change_is_kept_with_the_run(run, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no sbatch
    assert main(["submit", str(run), "cluster.time=00:20:00"]) == 1
    assert "there is no sbatch on this machine" in capsys.readouterr().err
    assert yaml.safe_load((run / "config.yaml").read_text())["cluster"]["time"] == "00:20:00"
    assert "cluster.time=00:20:00" in yaml.safe_load((run / "overrides.yaml").read_text())


def test_a_run_that_is_done_is_not_sent(run, capsys):
    (run / "FINISHED").write_text('{"step": 2}')
    assert main(["submit", str(run)]) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["./none", "outputs"])
def test_what_is_no_run_folder_is_said(name, run, capsys):
    assert main(["submit", name]) == 1
    assert f"{name.removeprefix('./')}: is no run folder" in capsys.readouterr().err


def test_a_run_of_another_cluster_is_not_sent(tmp_path, run, capsys):
    text = (run / "config.yaml").read_text()
    values = yaml.safe_load(text)
    values["cluster"] = {"kind": "local"}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["submit", str(run)]) == 2
    assert "cluster: this run is not set up for jobs" in capsys.readouterr().err
