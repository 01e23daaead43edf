"""What a LoRA file is: its header, key dialect, layer names and modules. Imports no torch."""
