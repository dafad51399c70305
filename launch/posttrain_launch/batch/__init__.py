"""Slurm: the job of a run."""
