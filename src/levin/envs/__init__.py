"""Environments: build the gymnasium vector env that `configs/env/*.yaml` describes, with a seed for every episode.

Start reading at `factory.py`, which builds them. `single.py` builds one env, `sync.py` steps several,
`vector.py` seeds the episodes, `config.py` lists every env option.
"""
