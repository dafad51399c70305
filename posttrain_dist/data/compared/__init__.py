"""Rows of answers: Record -> one prompt and the answers to it as tokens -> a unit of samples."""
