"""Triton's kernels run on the CPU where there is no GPU; asked for before they are imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
