"""sweep.html: every trial of a sweep, from plain data."""

from __future__ import annotations

from posttrain_dist.report.sweep.sweep_page import write_sweep_page

__all__ = ["write_sweep_page"]
