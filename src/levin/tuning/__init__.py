"""Search for hyper-parameters with Optuna: search spaces, trials of several runs each, pruning, the winner's config.

Start reading at `study.py`, which opens a search. `trials.py` trains the runs of its trials and reports evaluations.
"""
