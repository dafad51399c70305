"""The public functions, their arguments and results, and the reference."""
