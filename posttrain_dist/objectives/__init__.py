"""Objectives: what is minimised. A dataclass each; a new one is one file and one YAML."""
