"""What all nodes share: the job table, the object store and telemetry. Nothing here depends on models."""
