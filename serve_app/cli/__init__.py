"""All commands of `lora-serve`, one group per file; `main` registers them."""
