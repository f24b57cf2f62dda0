"""What every other package stands on: errors, paths, seeds, files, spaces of an env, and all-reduce between ranks.

Nothing here knows an algorithm or an env. Start reading at `spaces.py`: what networks read of an observation.
"""
