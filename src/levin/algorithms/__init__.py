"""Algorithms: one file per paper, and what all of them need besides mathematics.

Start reading at `README.md`, which maps the lecture onto these files, or at `sac.py`. `base.py` is the LightningModule
that each of them is.
"""
