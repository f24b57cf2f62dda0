"""Several processes in one run: data-parallel ranks, lock-free Hogwild workers, and the sharding of their config.

Start reading at `data_parallel.py`.
"""
