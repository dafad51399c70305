"""The memory of a rank: what it allocates, operation by operation."""
