"""Batches for notebooks and scripts: from a table of prompts to pictures and contact sheets."""

from serve_app.batch.batch import Batch, map_batches

__all__ = ["Batch", "map_batches"]
