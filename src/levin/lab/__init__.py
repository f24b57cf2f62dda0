"""Measurements of gradient estimators on problems whose gradient is known: bias, variance, time.

Start reading at `measure.py`; `make study NAME=lab` runs it. The estimators themselves are in `levin.estimators`.
"""
