"""torch.compile of what is worth it in a decoder layer: its norms and its MLP.

Row by row, so that the number of rows is the only size that changes; it is dynamic, and a packed
row of another length compiles nothing again, nor does another layer. Attention stays as it is: its
loop over samples would be another program for every row.
"""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from posttrain_dist.errors import ConfigError
from posttrain_dist.models.layers import decoder_layers


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the forward of the norms and of the MLP of every decoder layer, in place.

    Raises:
        ConfigError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if backend == "inductor" and shutil.which(compiler) is None:
        raise ConfigError(
            f"needs a C++ compiler, and there is no {compiler}",
            where="model.compile",
            fix="install g++, or set model.compile=false",
        )
    for layer in decoder_layers(model):
        for name, module in layer.named_children():
            if name == "mlp" or name.endswith("norm"):
                # The forward and not the call: hooks on the module stay outside.
                module.forward = torch.compile(module.forward, dynamic=True, backend=backend)
