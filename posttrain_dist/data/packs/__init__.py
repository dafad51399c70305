"""Examples -> batches: mix, order, pack, balance, collate, prefetch."""
