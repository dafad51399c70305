"""`hydra/sweeper=posttrain_optuna`: searches values by ask and tell, and gives up poor trials.

options.py   hydra.sweeper.*, checked
space.py     choice, range, interval and tag(log, …) of Hydra's syntax as what is searched
journal.py   study.journal of the sweep's folder, whole again after a kill
methods.py   the samplers and pruners by name
study.py     the search itself: proposes, observes, takes in results; survives its driver
"""
