"""`python -m benchmarks.gpu [--tiny] [--only NAMES] [--out FILE]`: log-probs, weight sync by IPC, train steps.

At the end one JSON object, which FILE has too, after each result.
"""

from benchmarks.gpu.job import main

main()
