"""LoRA files: from a reference in a request to active adapters on a pipeline."""
