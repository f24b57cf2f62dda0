"""Speed beside the peers: the same work, interleaved in one call, medians and ratios. `python -m levin.bench what=sac`.

A ratio survives a noisy machine and an absolute time does not, so every comparison alternates short segments of the
two sides. Run it with nothing else on the machine. Peers live in an environment of their own (`make bench-setup`).
Start reading at `peers.py`.
"""
