"""Print which of our bare folder names resolve inside a Ray worker: run_folder."""

import importlib.util
import json
import os
import sys

import ray

os.chdir(sys.argv[1])
ray.init(
    include_dashboard=False,
    log_to_driver=False,
    num_cpus=1,
    object_store_memory=100_000_000,
    _node_ip_address="127.0.0.1",
)


@ray.remote
def resolve(names: list[str]) -> dict[str, list[str]]:
    """Where each name would be imported from; a folder without __init__.py counts too."""
    found = {name: importlib.util.find_spec(name) for name in names}
    return {
        name: [str(spec.origin), *(spec.submodule_search_locations or ())] if spec else []
        for name, spec in found.items()
    }


names = ["kernels", "launch", "tests", "slurm", "conf", "posttrain_launch.conf"]
print("NAMES " + json.dumps(ray.get(resolve.remote(names))))
ray.shutdown()
