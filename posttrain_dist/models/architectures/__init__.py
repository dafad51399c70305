"""Which architectures are trained, and what is known of each one. Imports no torch.

known.py             the table: trained, or refused and why
refusals.py          a config.json against it, before anything is prepared
native_types.py      what transformers itself has, asked for types that the table does not know
positions.py         how long a row may be
row_keywords.py      for layers that keep the bounds of samples from their attention
failures.py          what dies inside a model, as an error that names it
"""
