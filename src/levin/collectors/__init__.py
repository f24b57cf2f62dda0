"""Collectors: step envs with a policy and yield rollouts. All are TorchRL `BaseCollector`s.

Start reading at `vector.py`, the default collector. `factory.py` chooses one by its name in the config.
"""
