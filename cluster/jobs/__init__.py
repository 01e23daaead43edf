"""The job table: how jobs are stored, claimed, moved between states and reported."""
