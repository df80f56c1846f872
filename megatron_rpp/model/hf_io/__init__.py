"""Files of a Hugging Face directory: read, checked, written."""
