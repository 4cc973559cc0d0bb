"""The API: serves one release of a text classifier from the Hugging Face Hub. It imports nothing from `pipeline`."""
