"""One replica of a model: claims jobs, renders them, publishes their outputs, renews its leases."""
