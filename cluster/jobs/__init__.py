"""The job table: what a job is, how it is stored, claimed, moved between states and reported."""
