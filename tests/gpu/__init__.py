"""What only a GPU can show. `python -m tests.gpu` runs all and prints a table; see docs/gpu.md.

Each test file holds one body a question: a function of a `Site`. On a GPU the site has Transformer Engine and sizes
that its kernels take; tests/unit/gpu_scripts runs the same bodies on CPU, tiny and with local layers.
"""
