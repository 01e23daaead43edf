"""Guarded HTTP for the URLs in requests."""
