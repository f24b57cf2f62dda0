"""Training: the loop of a run around Lightning's Trainer, and its callbacks (evaluation, checkpoints, metrics).

Start reading at `session.py`, which opens with the loop in pseudocode.
"""
