"""What is private to Ray: there on the version that was tested, and not needed."""

import importlib
import subprocess
import sysconfig
from pathlib import Path

import pytest
import ray
from posttrain_launch.ray import private_names
from ray_runs import actors_of, losses

POSTTRAIN = Path(sysconfig.get_path("scripts")) / "posttrain"


def is_there(module: str, name: str) -> bool:
    found = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def test_every_private_name_is_there_on_the_version_that_was_tested():
    if not ray.__version__.startswith(tuple(f"{each}." for each in private_names.TESTED)):
        pytest.skip(f"Ray {ray.__version__} was not tested, so none of them is used")
    assert [each for each in private_names.NAMES if not is_there(*each)] == []
    from posttrain_launch.ray.lean_trainer import UNUSED_CALLBACKS

    names = {name for _, name in private_names.NAMES}
    assert set(UNUSED_CALLBACKS) <= names


@pytest.mark.parametrize(
    ("version", "switch", "used", "log"),
    [
        ("2.60.0", None, True, ""),
        ("2.60.3", None, True, ""),
        ("2.6.0", None, False, "Ray 2.6.0 was not tested (2.60 was): its plain trainer is used"),
        ("2.61.0", None, False, "Ray 2.61.0 was not tested (2.60 was)"),
        ("2.60.0", "0", False, "POSTTRAIN_RAY_PRIVATE=0: Ray's plain trainer is used"),
    ],
)
def test_another_version_turns_them_off(version, switch, used, log, monkeypatch, tmp_path):
    monkeypatch.setattr(private_names.ray, "__version__", version)
    monkeypatch.delenv(private_names.SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(private_names.SWITCH, switch)
    monkeypatch.setenv("RAY_TMPDIR", "")
    monkeypatch.setattr(private_names, "_stay_on_loopback", lambda: None)
    assert private_names.are_used() == used
    options = private_names.own_ray_options(tmp_path / "ray")
    assert set(options) == ({"_temp_dir", "_node_ip_address"} if used else set())
    if not used:
        assert private_names.unused_because().startswith(log)


@pytest.mark.ray
@pytest.mark.slow
def test_without_them_the_losses_are_the_same_and_the_folder_is_still_private(
    tiny_llama, rows_file, tmp_path, monkeypatch
):
    words = [
        f"model.path={tiny_llama}",
        f"data.train={rows_file}",
        "data.max_length=64",
        "train.steps=4",
        "train.batch_size=4",
        "optimizer.lr=0.003",
        "engine=zero1",
        "cluster=ray",
        "cluster.workers=2",
        "cluster.cpus_per_worker=0.5",
        "logging.wandb=off",
        "eval.generate_rows=0",
        "checkpoint.export=false",
    ]
    found = {}
    for name, switch in (("lean", "1"), ("plain", "0")):
        monkeypatch.setenv(private_names.SWITCH, switch)
        done = subprocess.run(
            [POSTTRAIN, "train", *words, f"name={name}", f"output_root={tmp_path}"],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        [found[name]] = (tmp_path / name).iterdir()
    assert losses(found["plain"]) == losses(found["lean"]) and len(losses(found["lean"])) == 4
    # The switch did switch, and Ray's logs come to the run folder from the private folder alike.
    log = (found["plain"] / "logs" / "driver.log").read_text()
    assert log.count("POSTTRAIN_RAY_PRIVATE=0: Ray's plain trainer is used") == 1
    assert "plain trainer" not in (found["lean"] / "logs" / "driver.log").read_text()
    trainers = {name: actors_of(folder) for name, folder in found.items()}
    assert trainers["lean"] < trainers["plain"]
    assert (found["plain"] / "ray" / "logs").stat().st_mode & 0o777 == 0o700
