"""Prepared examples on disk, as flat arrays that every worker maps."""
