"""A run as a job of a cluster: what is sent, what is not, and the life of the job."""

import json
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from posttrain_launch.compose.composer import Composed
from posttrain_launch.lifecycle.exit_codes import Exit
from posttrain_launch.ray import remote, token
from posttrain_launch.ray.jobs import arrival, sending
from posttrain_launch.run.job_record import read_job
from ray_cluster import ray_cluster
from ray_runs import losses, small_run, wait_until

from posttrain_dist.config import Local, ModelConfig, Ray, RunConfig, ray_rules
from posttrain_dist.errors import ClusterError, ConfigError, PosttrainError
from posttrain_dist.preflight import input_problems

POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"
API = "http://head:8265"


# ------------------------------------------------------------------------------ no Ray needed


@pytest.mark.parametrize(
    ("address", "fix"),
    [
        (None, "http://HOST:8265"),
        ("head:6379", "http://head:8265"),
        ("ray://head:10001", "http://head:8265"),
    ],
)
def test_a_job_api_is_http(address, fix, monkeypatch):
    monkeypatch.delenv(ray_rules.API_ADDRESS, raising=False)
    with pytest.raises(ConfigError) as failure:
        ray_rules.job_api(address)
    assert failure.value.where == "cluster.address"
    assert fix in failure.value.fix
    monkeypatch.setenv(ray_rules.API_ADDRESS, API)
    assert ray_rules.job_api(None) == API


def test_only_slurm_and_ray_take_jobs(tiny_llama, rows_file):
    def where(cluster):
        config = RunConfig(cluster=cluster, model=ModelConfig(path=str(tiny_llama)))
        return [each.where for each in input_problems(config, "submit")]

    assert "cluster" in where(Local())
    assert "cluster" not in where(Ray(address=API))


def test_files_of_another_machine_are_not_looked_for_here():
    elsewhere = ModelConfig(path="/not/here")
    here, there = (
        RunConfig(model=elsewhere, cluster=Ray(address=API, shared_folders=shared))
        for shared in (True, False)
    )
    assert any(each.where == "/not/here" for each in input_problems(here, "submit"))
    assert input_problems(there, "submit") == []


def test_a_path_of_this_machine_does_not_travel():
    config = RunConfig(
        model=ModelConfig(path="/shared/model"), output_root="outputs", cluster=Ray(address=API)
    )
    [problem] = sending.relative_paths(config)
    assert problem.where == "output_root" and "output_root=/shared/outputs" in problem.fix
    assert sending.relative_paths(replace(config, output_root="~/runs")) == []


def test_a_run_that_travels_as_text_is_made_where_it_arrives(
    tiny_llama, rows_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = RunConfig(
        name="sent",
        model=ModelConfig(path=str(tiny_llama)),
        output_root=str(tmp_path / "there"),
        cluster=Ray(address=API, shared_folders=False),
    )
    config.data.train = str(rows_file)
    composed = Composed(config, {"cluster": "ray"}, ["name=sent"])
    monkeypatch.setenv(arrival.SENT, arrival.to_text(composed, "posttrain submit", force=False))
    folder = arrival.arrive()
    assert folder.parent == tmp_path / "there" / "sent"
    assert RunConfig.from_yaml((folder / "config.yaml").read_text()).name == "sent"
    assert json.loads((folder / "run.json").read_text())["command"] == "posttrain submit"
    with pytest.raises(PosttrainError, match="nothing was sent along"):
        arrival.arrive()

    lacking = replace(config, model=ModelConfig(path="/not/here"))
    text = arrival.to_text(replace(composed, config=lacking), "", force=False)
    monkeypatch.setenv(arrival.SENT, text)
    with pytest.raises(PosttrainError, match="/not/here"):
        arrival.arrive()


def test_a_client_that_is_not_installed_is_named(monkeypatch):
    found = remote.importlib.util.find_spec
    monkeypatch.setattr(
        remote.importlib.util, "find_spec", lambda name: None if name == "aiohttp" else found(name)
    )
    with pytest.raises(ClusterError, match=r"no aiohttp") as failure:
        remote.submit(remote.request_to_run(API, "a", "posttrain", ["run"]))
    assert "posttrain-dist[jobs]" in failure.value.fix


def test_an_address_where_nothing_listens_is_named():
    with pytest.raises(ClusterError, match="no job API of Ray answers") as failure:
        remote.submit(remote.request_to_run("http://127.0.0.1:9", "a", "posttrain", ["run"]))
    assert failure.value.where == "cluster.address=http://127.0.0.1:9"


def test_a_token_is_used_where_it_was_given_and_missed_where_it_is_not(tmp_path):
    file = tmp_path / "token"
    for given, mode in (
        ({token.TOKEN: "t"}, "token"),
        ({token.TOKEN_PATH: str(file)}, "token"),
        ({token.TOKEN: "t", token.MODE: "disabled"}, "disabled"),
        ({}, None),
    ):
        token.use_given_token(given)
        assert given.get(token.MODE) == mode
    on = {token.MODE: "token", token.TOKEN_PATH: str(file)}
    with pytest.raises(ClusterError, match=r"token cannot be read: No such file"):
        token.check_given_token("cluster.address=a", on)
    file.write_text("\n")
    with pytest.raises(ClusterError, match="is empty"):
        token.check_given_token("cluster.address=a", on)
    file.write_text("t")
    token.check_given_token("cluster.address=a", on)


def test_what_is_sent_is_one_command_and_no_secret(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(token.TOKEN, "a-canary")
    config = RunConfig(name="n", cluster=Ray(address=API, program="/opt/posttrain"))
    assert sending.send_run(config, tmp_path / "a run", dry_run=True) == 0
    printed = capsys.readouterr().out
    assert f"to {API}\nrun /opt/posttrain run '{tmp_path}/a run' --address auto\n" in printed
    assert "canary" not in printed


# ------------------------------------------------------------------------------- a real cluster


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster(jobs=True) as made:
        made.start_head("--num-cpus=2")
        yield made


def of_job(cluster, question: str, folder: Path):
    """What Ray says of the job of a folder; see the script."""
    script = Path(__file__).parents[2] / "workers" / "ray_jobs.py"
    done = subprocess.run(
        [sys.executable, script, question, folder],
        env=cluster.environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def wait_for_end(cluster, folder: Path) -> dict:
    """The state of a job that has ended."""

    def ended():
        found = of_job(cluster, "state", folder)
        return found if found["exit_code"] is not None else None

    return wait_until(ended, 120)


def submit(cluster, folder: Path, *words: str, **changes: str | None):
    command = [POSTTRAIN, "submit", f"cluster.address={cluster.api}", *words]
    return subprocess.run(
        command,
        cwd=folder,
        env=cluster.environment(**changes),
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_outlives_its_sender_and_its_losses_are_those_of_a_run_here(
    cluster, tiny_llama, rows_file, tmp_path
):
    words = small_run(tiny_llama, rows_file, tmp_path / "out")
    here = [word for word in words if not word.startswith("cluster")]
    subprocess.run([POSTTRAIN, "train", *here], cwd=tmp_path, check=True, capture_output=True)
    [plain] = (tmp_path / "out" / "small").iterdir()

    done = submit(cluster, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    [folder] = set((tmp_path / "out" / "small").iterdir()) - {plain}
    record = read_job(folder)
    assert (record.system, record.address) == ("ray", cluster.api)
    # The sender is gone. One that only looks may be killed, too.
    looks = subprocess.Popen(
        [POSTTRAIN, "submit", f"cluster.address={cluster.api}", *words, "--wait", "name=other"],
        cwd=tmp_path,
        env=cluster.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert looks.stdout.readline().startswith("submitted job ")
    looks.kill()
    assert wait_for_end(cluster, folder)["state"] == "finished"
    assert (folder / "FINISHED").is_file()
    assert losses(folder) == losses(plain)
    printed = of_job(cluster, "tail", folder)
    assert f"run folder: {folder}" in printed
    followed = of_job(cluster, "follow", folder)
    assert followed.count("run folder:") == 1 and followed.strip() in printed
    [other] = (tmp_path / "out" / "other").iterdir()
    wait_until(lambda: (other / "FINISHED").is_file(), 120)

    everywhere = [*tmp_path.rglob("*"), *cluster.logs().rglob("*")]
    texts = [file for file in everywhere if file.is_file() and not file.is_symlink()]
    assert [file for file in texts if cluster.token.encode() in file.read_bytes()] == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_laptop_sends_text_and_stops_what_it_sent(cluster, tiny_llama, rows_file, tmp_path):
    laptop = tmp_path / "laptop"
    laptop.mkdir()
    words = small_run(tiny_llama, rows_file, tmp_path / "there", steps=5000)
    words += ["cluster.shared_folders=false", f"cluster.program={POSTTRAIN}", "train.save_every=9"]
    done = submit(cluster, laptop, *words)
    assert done.returncode == 0, done.stderr
    [stub] = (laptop / "outputs" / "small").iterdir()
    assert sorted(each.name for each in stub.iterdir()) == ["job.json", "sent.yaml"]
    [folder] = wait_until(lambda: list((tmp_path / "there" / "small").glob("*")), 60)
    wait_until(lambda: (folder / "metrics.jsonl").is_file() and len(losses(folder)) > 2, 120)
    assert of_job(cluster, "state", stub)["state"] == "running"
    again = subprocess.run(
        [POSTTRAIN, "submit", stub],
        env=cluster.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert again.returncode != 0 and "config.yaml" in again.stderr

    assert of_job(cluster, "stop", stub)
    ended = wait_for_end(cluster, stub)
    assert (ended["state"], ended["exit_code"]) == ("stopped", Exit.stopped)
    outcome = json.loads((folder / "logs" / "outcome.json").read_text())
    assert outcome["outcome"] == "stopped"
    assert (folder / "checkpoints" / f"step-{outcome['step']:06d}" / "MANIFEST.json").is_file()


@pytest.mark.ray
@pytest.mark.slow
def test_a_failure_on_the_cluster_is_the_exit_code_of_who_waits(
    cluster, tiny_llama, rows_file, tmp_path
):
    words = small_run(tiny_llama, "/not/there.jsonl", tmp_path / "there")
    words += ["cluster.shared_folders=false", f"cluster.program={POSTTRAIN}"]
    done = submit(cluster, tmp_path, *words, "--wait")
    assert done.returncode == Exit.failed
    assert "/not/there.jsonl" in done.stdout

    done = submit(cluster, tmp_path, *words, "--wait", "cluster.program=/no/posttrain")
    assert done.returncode == 127 and "set cluster.program" in done.stdout

    for changes, what in (
        ({"RAY_AUTH_TOKEN": "wrong"}, "refuses the token"),
        ({"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None}, "asks for a token"),
    ):
        done = submit(cluster, tmp_path, *words, **changes)
        assert done.returncode == 1
        assert f"error: cluster.address={cluster.api}: {what}" in done.stderr
        assert "RAY_AUTH_TOKEN_PATH=" in done.stderr and "wrong" not in done.stderr
