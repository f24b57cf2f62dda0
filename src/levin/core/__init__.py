"""Basics that all other packages use: errors, paths, seeds, files, env spaces, and all-reduce between ranks.

Nothing here depends on an algorithm or an env. Start reading at `spaces.py`, which describes spaces, and
`network_input.py`, which converts observations for networks.
"""
