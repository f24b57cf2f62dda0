"""Several processes in one run: data-parallel ranks, lock-free Hogwild workers, and the share of each in the config.

Start reading at `data_parallel.py`.
"""
