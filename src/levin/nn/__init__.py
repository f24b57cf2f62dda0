"""Neural networks and what trains them: layers, distributions, normalizers, exploration noise, optimizers, CUDA graphs.

Start reading at `networks.py`. Algorithms build their actors and critics from it; `layers.py` and `encoders.py` have
what `algo.network` chooses.
"""
