"""Which model types transformers has itself, without torch in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from typing import NamedTuple

# transformers reads its tables without torch too, and then leaves out whatever needs it.
_SCRIPT = """
import json, sys
sys.modules["torch"] = None
from posttrain_dist.models.architectures.native_types import look_up
print(json.dumps(look_up(sys.argv[1])))
"""


class Native(NamedTuple):
    """What transformers has under a model type."""

    config: bool  # it knows the type
    causal_lm: bool  # ... as a causal LM
    version: str  # of transformers


@lru_cache
def native(model_type: str) -> Native | None:
    """What transformers has under `model_type`; None: it could not be asked.

    Where it is not imported yet, a process of its own looks, in 2 s.
    """
    if "transformers.models.auto.modeling_auto" in sys.modules:
        return look_up(model_type)
    command = [sys.executable, "-P", "-c", _SCRIPT, model_type]
    done = subprocess.run(command, capture_output=True, check=False)
    return Native(*json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None


def look_up(model_type: str) -> Native:
    """What transformers has under `model_type`; imports it."""
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return Native(
        model_type in CONFIG_MAPPING_NAMES,
        model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        __version__,
    )
