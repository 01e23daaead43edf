"""The commands of `lora-serve`, one group per file; `serve_app.cli` puts them together."""
