"""What runs on GPUs: the catalogue of models, the engine that renders, and the workers that claim jobs."""

import os

# Transformers tells at import that torchvision is missing; nothing here uses it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
