"""Environments: build the gymnasium vector env that `configs/env/*.yaml` describes, with a seed for every episode.

Start reading at `factory.py`, which builds them. `sync.py` steps single envs, `vector.py` seeds the episodes,
`config.py` lists every env option.
"""
