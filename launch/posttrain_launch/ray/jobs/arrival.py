"""A run that came to a cluster as text: checked against the files there, and given its folder.

The text is one variable of the job's environment: no file of the sender is of any use here.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from posttrain_dist.config import Ray, RunConfig, complete
from posttrain_dist.errors import PosttrainError
from posttrain_dist.preflight import check_inputs
from posttrain_launch.compose.composer import Composed
from posttrain_launch.compose.paths import with_absolute_paths
from posttrain_launch.run.freeze import freeze

SENT = "POSTTRAIN_SENT"


def to_text(composed: Composed, command: str, *, force: bool) -> str:
    """What `arrive` makes a run of."""
    sent = {
        "config": complete(composed.config).to_yaml(),
        "choices": composed.choices,
        "overrides": composed.overrides,
        "command": command,
        "force": force,
    }
    return json.dumps(sent)


def arrive() -> Path:
    """Make the folder of the run that this job was sent with.

    Raises:
        PosttrainError: nothing was sent, or files that it names are not on the cluster.
    """
    try:
        sent = json.loads(os.environ.pop(SENT, ""))
        config = RunConfig.from_yaml(sent["config"])
        assert isinstance(config.cluster, Ray)
        config = replace(config, cluster=replace(config.cluster, shared_folders=True))
        composed = Composed(config, sent["choices"], sent["overrides"])
        command, force = sent["command"], sent["force"]
    except (ValueError, KeyError, TypeError) as error:
        raise PosttrainError(
            "there is no run to start: nothing was sent along",
            where="posttrain run -",
            fix="name the folder of a run; `-` is for jobs that `posttrain submit` sends to Ray",
        ) from error
    check_inputs(with_absolute_paths(config), "submit")  # what it left out elsewhere
    return freeze(composed, command, force=force)
