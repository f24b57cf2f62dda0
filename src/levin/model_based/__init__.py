"""Parts that world models share: recurrent policies, envs inside a model, and pictures of open-loop predictions.

Start reading at `dream_env.py`: a model in the place of an env.
"""
