"""Several LoRA trainings over one frozen base in one process, each with the numbers of its own run.

train_together.py  the runs step by step in turn; one that ends or fails leaves the others alone
shared_base.py     trees of modules over the same weights, each with an adapter of its own
shared_forward.py  one pass of the backbone for the rows of all runs
segments.py        a layer over a row that consists of one segment for each adapter

It saves the base's memory for all runs but one, and gives the device rows that are as many times as
long. What an adapter is, its optimizer, clipping, metrics and checkpoints are those of its run.
"""
