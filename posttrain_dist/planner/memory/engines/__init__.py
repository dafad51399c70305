"""The memory of the engines: parameters, gradients, optimizer state; one file an engine."""
