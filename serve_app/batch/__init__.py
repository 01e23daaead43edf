"""Batches from notebooks and scripts: tables of prompts in, pictures and contact sheets out."""

from serve_app.batch.batch import Batch, map_batches

__all__ = ["Batch", "map_batches"]
