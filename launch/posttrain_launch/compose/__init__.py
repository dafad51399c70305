"""Overrides of a command line -> one checked RunConfig, by Hydra."""
