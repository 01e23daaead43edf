"""Turns requests into jobs: model rules, limits and defaults. Does not know the HTTP routes."""
