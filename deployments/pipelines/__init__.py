"""One module per model family, for whatever differs from a plain diffusers pipeline or call."""
