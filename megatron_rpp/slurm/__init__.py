"""A run as a SLURM job: its script, its steps, and how it goes on after a failure. Imports no torch."""
