"""The Ray side of a run: the job, its trainer, its workers."""
