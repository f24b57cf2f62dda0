"""Command `python -m levin.lab [out=runs/lab] [rows=20000]`: measure the gradient estimators."""

from levin.config import cli
from levin.core.errors import exit_on_user_error
from levin.lab.measure import lab

if __name__ == "__main__":
    with exit_on_user_error():
        lab(**cli.command_arguments(lab))
