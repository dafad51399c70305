"""A Slurm for a test."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import SCRIPT, Cluster


@pytest.fixture
def made_cluster() -> Iterator[Callable[..., Cluster]]:
    """Makes a cluster of some nodes, which ends with the test."""
    # Not below pytest's folder: a socket's path may have 107 bytes only.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/var/tmp"))
    try:
        yield lambda nodes=2, **options: Cluster(folder, nodes, **options)
    finally:
        subprocess.run(["bash", str(SCRIPT), str(folder), "down"], timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(made_cluster: Callable[..., Cluster]) -> Cluster:
    """Two nodes."""
    return made_cluster()
