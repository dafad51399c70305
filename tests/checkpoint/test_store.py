"""Checkpoints on several ranks, and what is kept of them."""

from __future__ import annotations

from posttrain_dist.checkpoint import store


def write(folder, step, keep, best=None):
    manifest = store.Manifest(step=step, layout={"engine": "x"}, channels=["a"])
    return store.save(
        folder, manifest, lambda state: (state / "x").write_text("x"), keep=keep, best=best
    )


def test_one_failing_rank_fails_all_and_hurts_no_checkpoint(tmp_path, run_workers):
    outputs = run_workers("fail_on_one.py", 2, tmp_path, timeout_s=60)
    assert "SAID " in outputs[0] and "1 of the other ranks failed" in outputs[0]
    assert "step 2 cannot be written: PytorchStreamWriter failed" in outputs[1]
    assert all("AGREED rank 0 looked" in output for output in outputs)
    (whole,) = store.whole_checkpoints(tmp_path)
    assert whole.name == "step-000003"
    assert sorted(store.read_manifest(whole).files) == ["state/rank-0", "state/rank-1"]


def test_the_newest_stay_and_the_one_just_written_always(tmp_path):
    for step in (5, 6, 999_999, 1_000_000):
        write(tmp_path, step, keep=0)
    names = [path.name for path in store.whole_checkpoints(tmp_path)]
    assert names == ["step-000005", "step-000006", "step-999999", "step-1000000"]
    write(tmp_path, 3, keep=3)
    names = [path.name for path in store.whole_checkpoints(tmp_path)]
    assert names == ["step-000003", "step-999999", "step-1000000"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000003\n"
    assert store.read_manifest(tmp_path / "checkpoints" / "step-000003").channels == ["a"]


def test_the_checkpoint_of_the_best_evaluation_stays(tmp_path):
    def names() -> list[str]:
        return [path.name for path in store.whole_checkpoints(tmp_path)]

    for step, best in ((2, 2), (4, 4), (6, 5), (8, 5), (10, 5)):
        write(tmp_path, step, keep=2, best=best)
    assert names() == ["step-000004", "step-000008", "step-000010"]  # 4 is at or before 5
    write(tmp_path, 12, keep=2, best=11)
    assert names() == ["step-000010", "step-000012"]
    write(tmp_path, 14, keep=2, best=None)
    assert names() == ["step-000012", "step-000014"]
