"""Collectors: they step envs with a policy and yield rollouts, as TorchRL's `BaseCollector` does.

Start reading at `vector.py`, the default collector. `factory.py` chooses one by its name in the config.
"""
