"""What every node shares: the job table, the object store, telemetry. It knows nothing of models."""
