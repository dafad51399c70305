"""Which parameters are trained, and what is inserted for it."""
