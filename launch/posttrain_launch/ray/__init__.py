"""The Ray side of a run: the job, its trainer, its workers.

child.py          the driver's side: starts the job, watches it and the head, raises what failed
job.py            the process that owns the tie to Ray
placement.py      what the workers ask for, compared with the nodes that are there
trainer.py        Ray Train; lean_trainer.py: with fewer processes
private_names.py  the switch for all that is private to Ray
workers.py        what runs inside a worker
head_watch.py     whether the head still answers; gate.py: when the workers may begin
token.py          what is said of a token that is missing or wrong
remote.py         Ray's job API; jobs/: `posttrain submit cluster=ray`
temp_folder.py    of a run's own Ray
"""
