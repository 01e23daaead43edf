"""Guarded HTTP for every URL that a request names."""
