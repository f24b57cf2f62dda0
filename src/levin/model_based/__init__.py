"""Parts that world models share: recurrent policies, envs inside a model, and open-loop predictions.

Start reading at `dream_env.py`: a world model used as an env.
"""
