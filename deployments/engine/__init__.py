"""One warm pipeline: loads a checkpoint, takes prompts, returns pictures and videos. Needs no Ray."""
