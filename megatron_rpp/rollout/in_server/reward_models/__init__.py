"""SGLang's own classes of reward models, with what its 0.5.23 gets wrong put right; for a server that scores.

Named in SGLANG_EXTERNAL_MODEL_PACKAGE: its modules are imported by the server alone, before SGLang's registry,
which still has every architecture that is not here.
"""
