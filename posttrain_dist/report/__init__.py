"""Pages and texts for people, drawn from JSON: of a run folder, and of the data of a run.

numbers, tables, blocks  numbers as text, tables of a terminal, JSON of any shape
run/                     report.html of a run folder
plan/                    a plan for the terminal and plan.html, from the planner's JSON
sweep/                   sweep.html, from the results of a sweep
data/                    data_report.html and the same for the terminal, from data_report.json
"""

from __future__ import annotations

from posttrain_dist.report.run.run_page import write_report

__all__ = ["write_report"]
