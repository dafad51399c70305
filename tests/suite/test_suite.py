"""The suite itself: what it says first, which tests share a process, and how a script is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from itertools import combinations, product
from pathlib import Path

import forkserver
import pytest
import schedule
import slowest_tests
from grids import grid

ROOT = Path(__file__).resolve().parents[2]


def test_a_machine_without_the_packages_is_told_first(tmp_path: Path) -> None:
    code = "import schedule\nschedule.find_program.__code__ = (lambda name: None).__code__\n"
    (tmp_path / "without.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(schedule.__file__).parent}"}
    command = [sys.executable, "-m", "pytest", "-p", "without", "--collect-only", __file__]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    first = done.stdout.splitlines()[:12]
    assert "missing Debian packages: slurm-wlm, munge, iproute2, chromium, shellcheck" in first
    assert "  skipped for it: pages in a browser (marked browser)" in first
    wanted = r"  to run them: (sudo )?apt-get install slurm-wlm munge iproute2 chromium shellcheck"
    assert [line for line in first if re.fullmatch(wanted, line)]


def test_only_what_is_missing_is_told() -> None:
    def find(program: str) -> str | None:
        return None if program == "chromium" else f"/bin/{program}"

    assert schedule.report(find, user=0) == [
        "missing Debian packages: chromium",
        "  skipped for it: pages in a browser (marked browser)",
        "  to run them: apt-get install chromium",
    ]
    assert schedule.report(lambda name: name, user=0) == []
    [line] = schedule.report(lambda name: name, user=1000)
    assert line.startswith("not root: tests/slurm is skipped")


def test_ci_installs_what_is_looked_for() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    installed = re.search(r"^packages=\((.*)\)$", text, re.MULTILINE)[1].split()
    assert set(schedule.PACKAGES) <= set(installed)


def test_what_waits_goes_first_and_to_one_process() -> None:
    group_of = schedule.group_of
    assert group_of(ROOT / "tests/test_demo.py") == group_of(ROOT / "tests/slurm/test_slurm.py")
    demo, layouts, kernels = (
        group_of(ROOT / "tests" / file)
        for file in ("test_demo.py", "test_layouts.py", "kernels/test_cross_entropy.py")
    )
    assert demo[0] < layouts[0] < kernels[0]
    assert len({demo[1], layouts[1], kernels[1]}) == 3


def test_a_group_stays_in_one_process(tmp_path: Path) -> None:
    """Read from a real run: a wrapper of pytest-xdist that does nothing would not be seen else."""
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    mark = "@pytest.mark.ray\n"
    for name, head in {"a": mark, "b": "", "c": mark, "d": ""}.items():
        (tmp_path / f"test_{name}.py").write_text(
            f"import os, pathlib, pytest\n{head}@pytest.mark.parametrize('i', range(6))\n"
            f"def test_it(i):\n    with open({str(tmp_path / 'seen')!r}, 'a') as file:\n"
            f"        file.write(f'{name} {{os.getpid()}}\\n')\n"
        )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "3", "-c"]
    command += [ROOT / "pyproject.toml", f"--rootdir={tmp_path}", tmp_path]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tools'}:{ROOT / 'tests/suite'}"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    of = {name: {pid for file, pid in seen if file == name} for name in "abcd"}
    assert len(seen) == 24 and all(len(pids) == 1 for pids in of.values())
    assert of["a"] == of["c"] and len(set.union(*of.values())) == 3


def test_by_default_any_two_values_of_a_grid_meet_and_slow_has_the_rest() -> None:
    axes = {"a": [1, 2, 3], "b": "pqrst", "c": [None, 1.5], "d": [0, 7, 8, 9]}
    mark = grid(**axes)
    names, cases = mark.args
    assert names == ("a", "b", "c", "d")
    assert [case.values for case in cases] == list(product(*axes.values()))  # each case once
    default = [case.values for case in cases if not case.marks]
    for (i, one), (j, other) in combinations(enumerate(axes.values()), 2):
        assert {(case[i], case[j]) for case in default} == set(product(one, other))
    assert len(default) <= 24  # of 120; 20 is the least
    assert {mark.name for case in cases for mark in case.marks} == {"slow"}


# -------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("start", [forkserver.start, forkserver.start_fresh])
def test_a_script_runs_as_python_runs_it(start, tmp_path: Path, run_workers) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print(__name__, sys.argv, os.getcwd(), sys.path[0], 'torch' in sys.modules)\n"
        "print('an error', file=sys.stderr, flush=True)\n"
        "os.system('echo a child')\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    place = tmp_path / "place"
    place.mkdir()
    process = start(script, "7", output=tmp_path / "said", cwd=place)
    assert process.wait(60) == 7
    said = (tmp_path / "said").read_text().splitlines()
    forked = start is forkserver.start
    assert f"__main__ {[str(script), '7']} {place} {tmp_path} {forked}" in said
    assert {"an error", "a child"} < set(said)


def test_a_script_that_hangs_can_be_ended(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import time\nprint('here', flush=True)\ntime.sleep(600)\n")
    process = forkserver.start(script, output=tmp_path / "said")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.kill()
    assert process.wait(20) == -9
    ends = time.monotonic() + 20
    while Path(f"/proc/{process.pid}").exists() and time.monotonic() < ends:
        time.sleep(0.05)
    assert not Path(f"/proc/{process.pid}").exists()


# -------------------------------------------------------------------------------- the table


def test_the_table_holds_the_slowest_with_their_whole_time(tmp_path: Path) -> None:
    cases = [("tests.a.test_b", "test_c[1-x@y]", 2.0), ("tests.test_d", "test_e@ranks", 30.26)]
    cases += [("tests.test_d", "test_f", 0.5)]
    rows = "".join(f'<testcase classname="{c}" name="{n}" time="{t}"/>' for c, n, t in cases)
    (tmp_path / "junit.xml").write_text(f"<testsuites><testsuite>{rows}</testsuite></testsuites>")
    page = tmp_path / "SLOWEST.md"
    page.write_text("# Slowest\n\n## before\n\nold\n\n## later\n\nkept\n")
    table = slowest_tests.table(tmp_path / "junit.xml", count=2)
    assert table.splitlines()[-2:] == [
        "| 30.3 | `tests/test_d.py::test_e` |",
        "| 2.0 | `tests/a/test_b.py::test_c[1-x@y]` |",
    ]
    assert "3 tests, 33 s in all" in table
    slowest_tests.write(page, "before", "`make test`, 2 cores", table)
    text = page.read_text()
    assert "old" not in text and text.count("## before") == 1
    assert text.endswith("## later\n\nkept\n") and "`make test`, 2 cores" in text
    slowest_tests.write(page, "after", "again", table)
    assert page.read_text().startswith(text.rstrip()) and "## after\n\nagain\n" in page.read_text()
