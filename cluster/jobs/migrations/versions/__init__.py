"""The migrations: one module per revision, named by its number."""
