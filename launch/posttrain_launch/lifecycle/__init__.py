"""What becomes of a run whose processes end: decisions alone, for Slurm, Ray and simulation alike.

exit_codes.py  what the exit code of a driver means, and who acts on it
"""
