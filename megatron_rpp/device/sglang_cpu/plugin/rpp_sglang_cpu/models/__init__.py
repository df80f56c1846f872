"""SGLang's own model classes for the families that this project trains.

Named in SGLANG_EXTERNAL_MODEL_PACKAGE, it spares the import of every other model at start; SGLang
falls back to its full registry for an architecture that is not here.
"""
