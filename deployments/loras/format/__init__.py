"""The LoRA file format: header, key dialects, layer names, modules. Imports no torch."""
