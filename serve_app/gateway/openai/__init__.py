"""OpenAI's image routes: OpenAI's bodies and errors around the submission of `/v1/inference`."""
