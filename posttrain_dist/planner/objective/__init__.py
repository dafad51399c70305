"""What a plan needs to know of the objective: its head, its reference, the shape of its rows."""
