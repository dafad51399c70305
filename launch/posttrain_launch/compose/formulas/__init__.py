"""Values that are computed from others: relations between keys, and ranges in equal ratios."""
