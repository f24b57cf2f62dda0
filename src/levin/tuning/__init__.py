"""Search for hyper-parameters with Optuna: search spaces, trials of several runs each, pruning, the winner's config.

Start reading at `study.py`, which asks for trials, trains their runs and reports their evaluations.
"""
