"""What becomes of a run whose processes end: for Slurm, Ray and simulation alike.

exit_codes.py  what the exit code of a driver means, and who acts on it
decide.py      how the starts of a run went -> end, start again, or wait. No I/O
lead.py        how long before the time limit a run has to be stopped. No I/O
starts.py      logs/starts.jsonl of a run folder: its starts, and how each ended
measured.py    the lead of a run folder, from the saves and steps that it has measured
deadline.py    when the job of a driver ends, and the stop before that
after.py       what a job script calls when its driver has ended
"""
