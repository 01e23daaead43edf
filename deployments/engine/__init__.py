"""One warm pipeline: checkpoints in, prompts in, pictures and videos out. Usable without Ray."""
