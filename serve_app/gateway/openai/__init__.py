"""OpenAI's image routes: its bodies and errors around the same submission as `/v1/inference`."""
