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
from transformers import __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
found = [name in table for name in sys.argv[1:]
         for table in (CONFIG_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)]
print(json.dumps([*found, __version__]))
"""


class Native(NamedTuple):
    """What transformers has under a model type."""

    config: bool  # it knows the type
    causal_lm: bool  # ... as a causal LM
    version: str  # of transformers


@lru_cache
def native(model_type: str) -> Native | None:
    """What transformers has under `model_type`; None: it could not be asked (2 s)."""
    command = [sys.executable, "-P", "-c", _SCRIPT, model_type]
    done = subprocess.run(command, capture_output=True, check=False)
    return Native(*json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None
