"""Tokens or chat out of a model; used by rollouts, evaluation and chat."""
