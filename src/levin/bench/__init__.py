"""Speed benchmarks against other libraries doing the same work: `python -m levin.bench what=sac`.

Absolute times vary on a noisy machine, ratios much less. Every comparison therefore alternates short segments of both
sides and reports medians of the ratios. Run it with nothing else on the machine. The other libraries (peers) have
their own Python environment, made by `make bench-setup`. Start reading at `peers.py`.
"""
