"""Environments: from a `configs/env/*.yaml` to gymnasium vector envs in which every episode has its own seed.

Start reading at `factory.py`, which builds them. `vector.py` seeds the episodes; `config.py` lists every env option.
"""
