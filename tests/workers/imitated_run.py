"""`python imitated_run.py FOLDER`: what `posttrain run` leaves in a run folder, in half a second.

The folder's config.yaml holds {"steps", "values": held-out loss of each step, "fails": exit code}.
"""

from __future__ import annotations

import fcntl
import json
import signal
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
given = json.loads((folder / "config.yaml").read_text())
logs = folder / "logs"
logs.mkdir(exist_ok=True)
lock = (logs / "driver.lock").open("w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(1)
with (folder / "starts").open("a") as file:
    file.write("start\n")
if (folder / "FINISHED").exists():
    sys.exit(0)
for stale in (folder / "STOP", logs / "outcome.json"):
    stale.unlink(missing_ok=True)
signal.signal(signal.SIGTERM, lambda *_: (folder / "STOP").touch())
rows = folder / "metrics.jsonl"
done = rows.read_text().count("\n") if rows.exists() else 0
for step in range(done + 1, given["steps"] + 1):
    time.sleep(given.get("step_s", 0.05))
    with rows.open("a") as file:
        row = {"step": step, "eval/loss": given["values"][step - 1], "time_s": float(step)}
        file.write(json.dumps(row) + "\n")
    if (folder / "STOP").exists():
        (logs / "outcome.json").write_text(json.dumps({"outcome": "stopped", "step": step}))
        sys.exit(130)
if given.get("fails"):
    sys.exit(given["fails"])
(folder / "FINISHED").write_text(json.dumps({"reason": "completed", "step": given["steps"]}))
