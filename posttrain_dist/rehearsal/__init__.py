"""What of memory is missing: tried before step 1, and named wherever it happens."""
