"""The public functions: losses and log-probabilities, their autograd and their reference."""
