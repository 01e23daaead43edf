"""From a request to a job: model rules, bounds and defaults. Knows nothing of HTTP routes."""
