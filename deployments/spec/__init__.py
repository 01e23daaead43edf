"""A job's resolved request. Admission writes it into the job table, and workers read it."""
