"""What runs inside SGLang servers. Nothing here imports megatron, megatron_rpp.device or SGLang itself."""
