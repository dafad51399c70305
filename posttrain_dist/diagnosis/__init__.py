"""The rules that watch a run: what they look at, what they say, and when a run ends early."""
