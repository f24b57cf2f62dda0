"""Reported results in `experiments/`: learning curves, published numbers, verdicts, tables and figures.

Start reading at `result.py`, which describes the folder of a result.
"""
