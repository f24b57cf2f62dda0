"""Algorithms, one file per paper, and `base.py`, the LightningModule that they all extend.

Start reading at `README.md`, which maps the lecture onto these files, or at `sac.py`.
"""
