"""What a run keeps of how long its saves took."""

import contextlib

import pytest

from posttrain_dist.checkpoint.save_times import FILE, KEPT, save_times, timed_save


def test_the_newest_saves_are_kept(tmp_path, monkeypatch):
    clock = iter([float(second) for i in range(20) for second in (100 * i, 100 * i + i)])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    (tmp_path / "logs").mkdir()
    assert save_times(tmp_path) == []
    for _ in range(12):
        with timed_save(tmp_path):
            pass
    assert save_times(tmp_path) == [float(i) for i in range(12)][-KEPT:]


def test_a_save_that_failed_says_nothing_of_the_next(tmp_path):
    (tmp_path / "logs").mkdir()
    with contextlib.suppress(RuntimeError), timed_save(tmp_path):
        raise RuntimeError
    assert save_times(tmp_path) == []


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path):
    with timed_save(tmp_path):  # there is no folder logs
        pass
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"save_s": 3}', '{"save_s": ["x"]}'])
def test_a_file_that_cannot_be_read_is_none(text, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / FILE).write_text(text)
    assert save_times(tmp_path) == []
