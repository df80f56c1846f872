"""What the chip gives: `python -m benchmarks.gpu` runs all of it; see docs/gpu.md."""
