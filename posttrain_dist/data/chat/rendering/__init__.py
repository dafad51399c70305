"""A chat template as Jinja: which it is, what it may use, what it writes of a conversation."""
