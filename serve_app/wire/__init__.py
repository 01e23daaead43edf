"""The HTTP contract: request and answer bodies, refusal codes, and what `/openapi.json` adds."""
