"""Temporary folders of killed processes are removed, and nobody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain_dist.files.temporary import MARKER, make_temporary, mark, remove_abandoned


@pytest.fixture
def dead() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def changed(folder: Path, **values: object) -> Path:
    owner = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({**owner, **values}))
    return folder


def test_only_marked_folders_of_ended_owners_go(dead: int, tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from posttrain_dist.files import temporary; "
    script += "made = temporary.make_temporary('x', Path(sys.argv[1])); (made / 'a').touch()"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    (killed,) = tmp_path.iterdir()
    reused = changed(make_temporary("x", tmp_path), start="1")  # its pid is another process now
    before_boot = changed(make_temporary("x", tmp_path), boot="another")

    alive = make_temporary("x", tmp_path)
    far = changed(make_temporary("x", tmp_path), pid=dead, host="another")
    container = changed(make_temporary("x", tmp_path), pid=dead, namespace="another")
    unmarked = tmp_path / "posttrain-mine"
    unmarked.mkdir()
    torn = make_temporary("x", tmp_path)
    (torn / MARKER).write_text("{")
    stranger = tmp_path / "tmpabc"
    stranger.mkdir()
    mark(stranger, dead)
    link = tmp_path / "posttrain-link"
    link.symlink_to(stranger)

    assert set(remove_abandoned(tmp_path)) == {killed, reused, before_boot}
    assert set(tmp_path.iterdir()) == {alive, far, container, unmarked, torn, stranger, link}
    assert alive.stat().st_mode & 0o777 == 0o700


def test_a_process_that_waits_to_be_collected_has_ended(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "0.2"])
    folder = make_temporary("x", tmp_path)
    mark(folder, process.pid)
    assert remove_abandoned(tmp_path) == []
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    assert remove_abandoned(tmp_path) == [folder]
    process.wait()
