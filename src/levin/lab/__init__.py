"""Measure bias, variance and time of gradient estimators on problems whose gradient is known.

Start reading at `measure.py`; `make study NAME=lab` runs it. The estimators themselves are in `levin.estimators`.
"""
