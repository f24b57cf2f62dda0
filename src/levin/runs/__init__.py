"""A run on the disk: its folder, checkpoints, provenance, and the trained policy that is loaded from it.

Start reading at `folder.py` for what a run folder holds, and at `policy.py` for `levin.load`.
"""
