"""The model that a preference objective compares the policy with.

open_reference.py  what a run needs of it: batches with its log-probabilities, and the start check
log_probs.py       log-probabilities of a batch by a model that is run without gradients
live.py            batches whose fields are filled in every step (adapter off, second copy)
second_model.py    the second copy, and another model folder
precomputed.py     the pass before step 1: an array beside the prepared data, resumable
kept_log_probs.py  that array as a folder, and kept in the data cache
identity.py        digests of what the reference is
start_check.py     before the first update policy and reference are equal
"""
