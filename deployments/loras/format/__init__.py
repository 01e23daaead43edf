"""The LoRA file format: header, key dialects, layer names, modules. Only `by_head` imports torch."""
