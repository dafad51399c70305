"""Adapters as folders: written and read, bound to their base model, merged and combined."""
