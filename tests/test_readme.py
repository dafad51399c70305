"""The README is true: its Python runs, its commands exist and compose."""

from __future__ import annotations

import json
import re
from pathlib import Path

import forkserver

from posttrain_dist.files import read_rows

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_example_trains(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    script, output = tmp_path / "example.py", tmp_path / "output"
    process = forkserver.start(script, output=output, cwd=tmp_path)
    assert process.wait(300) == 0, output.read_text()
    folder = tmp_path / "outputs" / "from_python"
    lines = output.read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"run folder: {folder}"
    assert any(line.startswith("step 5/5  loss ") for line in lines)
    assert [line.split()[0] for line in lines[-4:]] == ["run", "report", "export", "W&B"]
    assert lines[-3].split()[1] == str(folder / "report.html")
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[-1]["step"] == 5
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"]
    assert json.loads((folder / "FINISHED").read_text()) == {"reason": "completed", "step": 5}
    for name in ("export/model.safetensors", "report.html"):
        assert (folder / name).is_file()


def test_the_table_names_every_verb():
    from posttrain_launch.cli import VERBS

    named = re.findall(r"^\| `posttrain (\w+)", README, re.MULTILINE)
    assert sorted(named) == sorted(VERBS)


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip()]


def test_the_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    typed = [c.split()[1] for c in commands() if c.startswith("make ")]
    assert set(typed) == {"demo", "demo_dpo", "test"} <= set(targets)


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        file, _, heading = target.partition("#")
        assert (ROOT / file).is_file(), target
        text = (ROOT / file).read_text(encoding="utf-8") if heading else ""
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert not heading or heading in [each.lower().replace(" ", "-") for each in headings]
