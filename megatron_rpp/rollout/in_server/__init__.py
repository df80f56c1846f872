"""What runs inside SGLang servers. Nothing here imports megatron or megatron_rpp.device; only reward_models, SGLang."""
