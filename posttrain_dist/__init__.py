"""Post-training of large language models on clusters: the library (no Ray, no Hydra)."""

__version__ = "0.1.0"
