"""What a job asks for, fully resolved: admission writes it into the job table, workers read it."""
