"""`run:NAME`: what the newest finished run of a name made, as a path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from posttrain_launch.compose.paths import with_absolute_paths

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import ModelError
from posttrain_dist.models import ModelConfig
from posttrain_dist.objectives.preference.dpo import Dpo
from posttrain_dist.tuning.lora import Lora


def made(root: Path, time: str, part: str | None, finished: bool = True) -> Path:
    run = root / "sft" / time
    run.mkdir(parents=True)
    if part:
        (run / part).mkdir()
    if finished:
        (run / "FINISHED").write_text("{}")
    return run


def path_of(root: Path, name: str = "run:sft") -> str:
    config = RunConfig(model=ModelConfig(path=name), output_root=str(root))
    return with_absolute_paths(config).model.path


def test_the_newest_finished_run_with_an_export_is_taken(tmp_path):
    made(tmp_path, "2026-11-28_10-00-00", "export")
    newest = made(tmp_path, "2026-11-29_10-00-00", "export")
    made(tmp_path, "2026-11-29_12-00-00", None)  # checkpoint.export=false
    made(tmp_path, "2026-11-30_10-00-00", "export", finished=False)
    assert path_of(tmp_path) == str(newest / "export")


def test_a_reference_is_named_like_a_model(tmp_path, monkeypatch):
    run = made(tmp_path, "2026-11-29_10-00-00", "export")
    monkeypatch.chdir(tmp_path)
    for name, path in (("run:sft", run / "export"), ("base", tmp_path / "base")):
        config = RunConfig(objective=Dpo(reference_model=name), output_root=str(tmp_path))
        assert with_absolute_paths(config).objective.reference_model == str(path)


def test_an_adapter_is_gone_on_with_and_is_no_model(tmp_path):
    run = made(tmp_path, "2026-11-29_10-00-00", "adapter")
    config = RunConfig(tuning=Lora(init_from="run:sft"), output_root=str(tmp_path))
    tuning = with_absolute_paths(config).tuning
    assert tuning == replace(Lora(), init_from=str(run / "adapter"))
    with pytest.raises(ModelError, match="the newest trained an adapter") as caught:
        path_of(tmp_path)
    assert f"posttrain export {run} OUT --merge" in caught.value.fix
    assert "tuning.init_from=run:sft" in caught.value.fix


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ModelError, match="there is no run 'sft'") as caught:
        path_of(tmp_path)
    assert caught.value.where == "model.path=run:sft"
    assert "name=sft" in caught.value.fix
    with pytest.raises(ModelError, match="there is no run ''"):
        path_of(tmp_path, "run:")
    run = made(tmp_path, "2026-11-29_10-00-00", "export", finished=False)
    with pytest.raises(ModelError, match="is finished") as caught:
        path_of(tmp_path)
    assert f"posttrain run {run}" in caught.value.fix
