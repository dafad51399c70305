"""Slurm: the job of a run.

job_options.py  config.cluster -> options of sbatch
job_script.py   those, a few variables and the shell of slurm/ -> job.sbatch
submit.py       sends it
"""
