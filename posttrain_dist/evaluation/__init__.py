"""A trained model's held-out loss per channel, and its answers before and after training."""
