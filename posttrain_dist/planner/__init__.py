"""What fits where, before anything starts: memory, time and disk of a run, from config.json alone.

    job.py         RunConfig and Hardware -> Job: all that is planned with, in numbers
    objective/     what it needs to know of the objective: head, reference, rows of answers
    memory/        Job -> what each rank and host allocates, phase by phase
    speed/         Job -> seconds of a step, network volume, checkpoint interval
    plan.py        Plan: what comes out; what is shown, written and compared
    fallbacks.py   which plans are tried, in which order; `tuning=auto engine=auto`
    inverse.py     the longest context, the fewest GPUs

Imports no torch: a plan takes milliseconds, on any machine.
"""
