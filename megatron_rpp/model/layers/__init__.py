"""Modules that stand in a layer spec in place of Megatron's own."""
