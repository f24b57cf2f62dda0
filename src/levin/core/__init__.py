"""Basics that all other packages use: errors, paths, seeds, files, env spaces, and all-reduce between ranks.

Nothing here depends on an algorithm or an env. Start reading at `spaces.py`: how observations become network input.
"""
