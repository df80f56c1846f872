"""Command-line tools around Hugging Face and Megatron checkpoints."""
