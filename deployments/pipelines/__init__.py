"""One module per model family: how its pipeline is loaded and called, where that differs from diffusers."""
