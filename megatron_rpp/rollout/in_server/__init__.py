"""What runs inside SGLang servers. Nothing here imports megatron or megatron_rpp.device.

Only reward_models and shared_request import SGLang.
"""
