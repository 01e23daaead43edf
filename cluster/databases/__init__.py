"""The databases that can hold the job table: PostgreSQL and SQLite."""
