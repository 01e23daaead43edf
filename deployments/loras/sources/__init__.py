"""Where a LoRA file comes from (LoRA root, web, hub, S3) and where a node caches it. Imports no torch."""
