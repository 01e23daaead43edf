"""What is on the device: LoRA files converted to adapters, held in host and device memory, switched."""
