"""A run that `auto` planned, until one of its fallbacks has the memory that it takes.

train_apart.py  one attempt, in a process of its own
fall_back.py    the run folder becomes that of the next fallback
"""
