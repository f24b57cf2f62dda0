"""Data that algorithms learn from: rollouts, replay buffers, sequences, and returns computed from rewards.

Start reading at `rollout.py`, which documents the TensorDict that every collector yields.
"""
