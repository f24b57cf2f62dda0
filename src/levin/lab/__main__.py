"""Measure the gradient estimators. `python -m levin.lab [out=runs/lab] [rows=20000]`."""

from levin.config import cli
from levin.core.errors import one_sentence
from levin.lab.measure import lab

if __name__ == "__main__":
    with one_sentence():
        lab(**cli.arguments(lab))
