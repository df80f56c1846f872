"""`python -m benchmarks.gpu [--tiny]`: log-probs, weight sync by IPC, train steps; at the end one JSON object."""

from benchmarks.gpu.job import main

main()
