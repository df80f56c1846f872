"""Makes torch ready for Megatron on CPU before any test module imports megatron."""

import megatron_rpp.device  # noqa: F401
