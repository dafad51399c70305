"""With this folder on PYTHONPATH, a process may allocate little more from where it can train.

LIMIT_MORE_BYTES says how much. What Ray's other processes take, and its threads before, is no part
of it.
"""

import os
import resource
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class LimitAtTraining(MetaPathFinder):
    """Sets the limit as the module that trains is imported; finds nothing."""

    def find_spec(self, name, path=None, target=None):
        if name == "posttrain_dist.train":
            sys.meta_path.remove(self)
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            (kib,) = [int(line.split()[1]) for line in lines if line.startswith("VmData:")]
            limit = kib * 1024 + int(os.environ["LIMIT_MORE_BYTES"])
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


sys.meta_path.insert(0, LimitAtTraining())
