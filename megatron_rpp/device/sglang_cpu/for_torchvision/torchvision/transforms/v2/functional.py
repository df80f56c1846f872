"""Empty: SGLang imports the name only."""
