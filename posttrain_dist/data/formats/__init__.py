"""Row shapes: what a row may look like, how one is recognised, and row -> Record."""
