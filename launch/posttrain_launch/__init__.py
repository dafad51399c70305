"""The command line: composes a config, makes the run folder, starts the processes."""
