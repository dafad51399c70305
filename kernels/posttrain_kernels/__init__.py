"""Fused operations of the training step; plain torch in and out, nothing of ours imported."""

from __future__ import annotations

from posttrain_kernels.head import HeadLoss, linear_cross_entropy

__all__ = ["HeadLoss", "linear_cross_entropy"]
