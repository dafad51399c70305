"""The process that holds a sweep's Ray open: `python -m …sweep.backends.ray_resources`.

It starts a Ray or joins one, prints {"address"}, and for each line of its stdin what there is now:
{"nodes": [resources], "free": resources}. It ends, and its own Ray with it, when its stdin closes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray

from posttrain_dist.errors import ClusterError
from posttrain_launch.ray.job import JOIN_TIMEOUT_S, OBJECT_STORE_BYTES, join
from posttrain_launch.ray.temp_folder import ray_folder


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(description="The Ray of a sweep.")
    parser.add_argument("--address", default=None, help="host:port of a running Ray")
    parser.add_argument("--temp-dir", type=Path, default=None, help="of our own Ray")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a Ray driver that gets TERM may dump 300 MB
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what Ray prints is no answer
    try:
        if given.address:
            join(given.address, JOIN_TIMEOUT_S)
        else:
            start(given.temp_dir)
    except ClusterError as error:
        _print(out, {"error": error.what, "where": error.where, "fix": error.fix})
        sys.exit(1)
    _print(out, {"address": ray.get_runtime_context().gcs_address})
    for _ in sys.stdin:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        _print(out, {"nodes": nodes, "free": ray.available_resources()})
    if given.temp_dir is not None:
        # By a process outside, for this one dies when its Ray does.
        command = [sys.executable, "-P", "-m", "posttrain_launch.ray.child", str(os.getpid())]
        subprocess.Popen([*command, str(given.temp_dir)], start_new_session=True)


def start(temp_dir: Path | None) -> None:
    """Start a Ray on this machine that listens on its loopback alone."""
    place = {} if temp_dir is None else {"_temp_dir": str(ray_folder(temp_dir))}
    if sys.platform == "linux":
        # For 127.0.0.1 Ray puts an address that others can reach, here and in whoever joins.
        place["_node_ip_address"] = "127.0.0.2"
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
        **place,
    )


def _print(out: Any, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
