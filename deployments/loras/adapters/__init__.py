"""Adapters: LoRA files converted for a pipeline, held in host and device memory, and switched per job."""
