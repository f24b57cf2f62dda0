"""Collectors: step envs with a policy and yield rollouts. All are of TorchRL's type `BaseCollector`.

Start reading at `vector.py`, the default collector. `factory.py` chooses one by its name in the config.
"""
