"""The folder of a run's own Ray, below the system's temporary one: private, marked, removed.

posttrain-ray-xxxxxxxx/     0700, so that nobody else comes to what Ray makes in it (it opens its
                            own folders to everyone)
  .posttrain-owner.json     which process it belongs to, and where its logs are kept
  ray/                      Ray's: session_.../sockets, logs
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from posttrain_dist.files.temporary import PREFIX, make_temporary, remove_abandoned

INSIDE = "ray"  # the name that Ray itself gives it below RAY_TMPDIR
LOGS = f"{INSIDE}/session_latest/logs"  # of Ray's newest session
# A Unix socket's path has at most 107 bytes, and Ray makes
# `<temp>/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store` of it.
LONGEST = 40


def make(run_folder: Path) -> Path:
    """A new folder, short enough for sockets; those of dead owners are removed first."""
    roots = [Path(tempfile.gettempdir()), Path("/tmp")]
    short = [root for root in roots if len(f"{root}/{PREFIX}ray-12345678/{INSIDE}") <= LONGEST]
    root = (short or roots)[0]
    remove_abandoned(root)
    return make_temporary("ray", root, keep={LOGS: run_folder / "ray" / "logs"})


def ray_folder(folder: Path) -> Path:
    """What Ray is given."""
    return folder / INSIDE
