"""One frozen run, from its data to FINISHED."""
