"""Configs: composed by Hydra from `configs/` and the command line, and checked against the code that takes each value.

Start reading at `compose.py`. `python -m levin.config` prints every value and the file that sets it.
"""
