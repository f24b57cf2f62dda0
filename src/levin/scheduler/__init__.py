"""Many runs as one command: processes side by side, the plan of a sweep that can be continued, a live table.

Start reading at `scheduler.py`, which starts the processes and watches them. `slurm_jobs.py` waits for SLURM's jobs.
"""
