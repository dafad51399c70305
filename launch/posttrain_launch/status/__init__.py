"""Where runs stand, for those who look: from run folders and the queue, whoever drives the run.

find_runs.py     the runs that words of a command line mean: folders, names, jobs
run_facts.py     what a run folder says of itself, without reading what is large
ray_jobs.py      jobs of Ray's job API, as those of the queue
run_state.py     folder and queue as one state, with the reason
status_table.py  the table, its live form, and JSON
stop_run.py      ending a run so that it saves first
log_parts.py     the logs of a run, the one that says most first; follow_logs.py: as they grow
"""
