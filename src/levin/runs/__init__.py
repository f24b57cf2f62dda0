"""A training run on disk: its folder, checkpoints and provenance, and how to load its trained policy.

Start reading at `folder.py` for the contents of a run folder, and at `policy.py` for `levin.load`.
"""
