"""The time of a step, from a table of devices and a model of what overlaps."""
