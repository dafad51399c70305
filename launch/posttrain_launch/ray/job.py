"""The Ray job of one run, a process of its own: `python -m posttrain_launch.ray.job RUN_FOLDER`.

It starts or joins Ray, checks that the workers fit, lets Ray Train place and restart them, and
leaves `logs/error.json` if that failed. It ends, and its Ray with it, when its stdin closes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from posttrain_dist.config import Ray, RunConfig, Slurm
from posttrain_dist.config.rules import single_on_many
from posttrain_dist.engine import Single
from posttrain_dist.errors import ClusterError, ClusterLost, PosttrainError, error_fields
from posttrain_dist.files import write_atomic
from posttrain_dist.logs import unfailing
from posttrain_launch.ray import private_names
from posttrain_launch.ray.child import error_file
from posttrain_launch.ray.gate import is_soon, wait_for_data
from posttrain_launch.ray.head_watch import address_file
from posttrain_launch.ray.placement import Node, missing_now, place, read_nodes
from posttrain_launch.ray.temp_folder import ray_folder
from posttrain_launch.ray.token import check_given_token, refusal
from posttrain_launch.ray.workers import WorkerError

OBJECT_STORE_BYTES = 200_000_000  # nothing large travels through it
JOIN_TIMEOUT_S = 10.0  # for a running Ray to answer
NODE_LABEL = "posttrain-node"  # of a Ray node in a Slurm job: what Slurm calls it


def main() -> None:
    """Run the job; exit code 0 or, with `logs/error.json` written, 1."""
    parser = argparse.ArgumentParser(description="The Ray job of one run.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--address", default=None, help="host:port of a running Ray")
    parser.add_argument("--given-by", default="", help="what gave the address")
    parser.add_argument("--temp-dir", type=Path, default=None, help="of our own Ray")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a Ray driver that gets TERM may dump 300 MB
    run_folder = arguments.run_folder.resolve()
    threading.Thread(target=_end_with_driver, args=(arguments.temp_dir,), daemon=True).start()
    # Half of what it takes to import Ray Train; meanwhile Ray's own processes start. Not ray.train
    # itself, which shares modules with what ray.init imports in this thread.
    threading.Thread(target=importlib.import_module, args=("pandas",), daemon=True).start()
    sys.stdout, sys.stderr = unfailing(sys.stdout), unfailing(sys.stderr)  # a log on a full disk
    try:
        run_job(run_folder, arguments.address, arguments.temp_dir, arguments.given_by)
    except Exception as failure:
        traceback.print_exc()
        fields = _describe(failure, run_folder)
        write_atomic(error_file(run_folder), json.dumps(fields, indent=1))
        sys.exit(1)
    finally:
        ray.shutdown()


def _end_with_driver(temp_dir: Path | None) -> None:
    """Wait for the end of stdin (the driver died), then have this job and its own Ray ended."""
    while os.read(0, 1024):
        pass
    print("the driver is gone; ending", file=sys.stderr, flush=True)
    # By a process outside: this one may be starting more, and dies when its Ray does.
    command = [sys.executable, "-P", "-m", "posttrain_launch.ray.child", str(os.getpid())]
    subprocess.Popen(command + ([str(temp_dir)] if temp_dir else []), start_new_session=True)


def run_job(
    run_folder: Path, address: str | None, temp_dir: Path | None, given_by: str = ""
) -> None:
    """Start or join Ray and train.

    Raises:
        ClusterError: Ray cannot be reached, or the workers do not fit.
        WorkerError: the training failed.
    """
    config = RunConfig.from_yaml((run_folder / "config.yaml").read_text(encoding="utf-8"))
    cluster = config.cluster
    assert isinstance(cluster, Ray)
    # Ray puts the driver's working directory on the workers' sys.path: never the checkout's.
    os.chdir(run_folder)
    if address:
        # In a Slurm job it is still starting.
        timeout_s = cluster.start_deadline_s if isinstance(cluster, Slurm) else JOIN_TIMEOUT_S
        join(address, timeout_s, given_by, run_folder / "logs" / "driver.log")
    else:
        ray.init(
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **private_names.own_ray_options(ray_folder(temp_dir) if temp_dir else None),
        )
    _stage("ray is there")
    write_atomic(address_file(run_folder), ray.get_runtime_context().gcs_address + "\n")
    if not private_names.are_used():
        _stage(private_names.unused_because())
    places = place(cluster, _nodes(cluster))
    if isinstance(config.engine, Single) and places.workers > 1:
        raise single_on_many(places.workers)
    from posttrain_launch.ray.trainer import fit  # imports ray.train

    if not is_soon(config, run_folder):
        wait_for_data(run_folder)
    if missing := missing_now(places, ray.available_resources()):
        _stage(f"waiting for others to end: free are {', '.join(missing)}")
    fit(config, run_folder, places, here=not address)
    _stage("the workers have ended")


# ------------------------------------------------------------------------------- the cluster


def join(
    address: str, timeout_s: float, given_by: str = "cluster.address", log: Path | None = None
) -> None:
    """Connect to a running Ray, which may still be starting.

    Args:
        log: where this process prints; Ray says only there that a token is wrong.
    """
    where = f"{given_by}={address}"
    check_given_token(where)
    fix = "start Ray on this machine: `ray start --head`, or `ray start --address=HOST:PORT`"
    if "RAY_ADDRESS" in given_by:
        fix += "; or `unset RAY_ADDRESS`, and the run starts a Ray of its own"
    if "://" in address:
        kind = "of Ray's job API" if address.startswith("http") else "a Ray client address"
        raise ClusterError(
            f"is {kind}, and the driver has to be on a node of the cluster",
            where=where,
            fix="give HOST:PORT of the cluster's head node, or send the run there with "
            "`posttrain submit` and cluster.address=http://HOST:8265",
        )
    deadline = time.monotonic() + timeout_s
    while True:
        printed = log.stat().st_size if log and log.exists() else 0
        try:
            if address != "auto":
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=5).close()
            ray.init(address=address, log_to_driver=False)
            return
        except ValueError as refused:
            raise ClusterError(
                f"is no address of a Ray: {refused}", where=where, fix=fix
            ) from refused
        except (OSError, RuntimeError) as refused:  # not listening yet, or no node of it here yet
            if (error := refusal(_printed_since(log, printed), where)) is not None:
                raise error from refused
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no Ray answers there after {timeout_s:g} s: {refused}",
                    where=where,
                    fix=fix,
                ) from refused
        time.sleep(0.5)


def _printed_since(log: Path | None, position: int) -> str:
    if log is None or not log.exists():
        return ""
    with log.open("rb") as stream:
        stream.seek(position)
        return stream.read().decode(errors="replace")


def _nodes(cluster: Ray) -> list[Node]:
    """Every node that is alive; in a Slurm job after all its nodes have come.

    Raises:
        ClusterError: they have not within `cluster.start_deadline_s`; it names who is missing.
    """
    if not isinstance(cluster, Slurm):
        return read_nodes(ray.nodes())
    deadline = time.monotonic() + cluster.start_deadline_s
    names = os.environ.get("POSTTRAIN_NODES", "").split()
    while True:
        alive = [node for node in ray.nodes() if node["Alive"]]
        missing = missing_parts(cluster, names, alive)
        if not missing:
            return read_nodes(alive)
        if time.monotonic() > deadline:
            raise ClusterLost(
                f"after {cluster.start_deadline_s} s {missing}",
                where="cluster.start_deadline_s",
                fix=f"read logs/ray-{os.environ.get('SLURM_JOB_ID', '*')}-NODE.log of the run "
                "folder; leave a bad node out with cluster.extra=['--exclude=NODE']",
            )
        time.sleep(0.2)


def missing_parts(cluster: Slurm, names: Sequence[str], alive: Sequence[dict[str, Any]]) -> str:
    """What of a job's nodes and GPUs has not come to Ray, in words; "": nothing.

    Args:
        names: of all nodes of the job, as Slurm has them; empty: they are not known.
        alive: rows of `ray.nodes()`.
    """
    found = {(node.get("Labels") or {}).get(NODE_LABEL): node for node in alive}
    if absent := [name for name in names if name not in found]:
        came = len(names) - len(absent)
        return f"{came} of {len(names)} nodes have joined Ray; missing: {', '.join(absent)}"
    if not names and len(alive) < cluster.nodes:
        return f"{len(alive)} of {cluster.nodes} nodes have joined Ray"
    wanted = cluster.gpus_per_node or 0
    short = [
        f"{name or 'a node'} has {node['Resources'].get('GPU', 0):g}"
        for name, node in found.items()
        if node["Resources"].get("GPU", 0) < wanted
    ]
    return f"not every node has {wanted} GPUs: {', '.join(short)}" if short else ""


def _stage(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------- failures


def _describe(failure: Exception, run_folder: Path) -> dict[str, Any]:
    """The content of `logs/error.json`."""
    trace = "".join(traceback.format_exception(failure))
    if isinstance(failure, WorkerError) and failure.error is not None:
        return error_fields(failure.error, failure.rank, failure.trace)
    if isinstance(failure, PosttrainError):
        return error_fields(failure, None, trace)
    first_line = (str(failure).strip().splitlines() or ["no message"])[0]
    what = f"{type(failure).__name__}: {first_line}"
    log = str(run_folder / "logs" / "driver.log")
    return error_fields(ClusterError(what, where=log, fix="read that log"), None, trace)


if __name__ == "__main__":
    # Under its real name: what it defines travels to workers by reference, not by value.
    from posttrain_launch.ray.job import main as run_main

    run_main()
