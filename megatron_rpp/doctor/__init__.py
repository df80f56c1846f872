"""Pre-flight: what would stop a run, found on every node before time is burnt.

`checks/` has a module a question: `measure` runs on each node, in a probe, and `check` judges the answers of all of
them. `probes.py` starts the probes and talks to them, `diagnose.py` goes through the checks in order.
"""
