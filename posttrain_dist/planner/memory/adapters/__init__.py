"""Memory of what a tuning puts beside the base model, and of a base in NF4.

placed.py     which linear layers of the network an adapter stands on
inserted.py   the tensors that it brings
"""
