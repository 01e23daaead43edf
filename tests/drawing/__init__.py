"""Trains the tiny FLUX.1 of the demo: the pictures it learns from, its parts, and a judge of the result."""
