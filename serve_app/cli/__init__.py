"""Every command of `lora-serve`, one group per file; `main` puts them together."""
