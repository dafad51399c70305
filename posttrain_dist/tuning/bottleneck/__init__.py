"""Bottleneck adapters (Houlsby et al., arXiv:1902.00751): small MLPs inside the layers.

bottleneck_tuning.py   the tuning: where they stand, what is trained
bottleneck_layer.py    the module, and how a sublayer gets one
adapters_format.py     names and config of the files of the `adapters` library
"""

from __future__ import annotations

from posttrain_dist.tuning.bottleneck.bottleneck_tuning import (
    Bottleneck,
    Nonlinearity,
    Placement,
)

__all__ = ["Bottleneck", "Nonlinearity", "Placement"]
