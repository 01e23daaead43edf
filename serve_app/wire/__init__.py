"""The HTTP contract: request and response bodies, refusal codes, and our additions to `/openapi.json`."""
