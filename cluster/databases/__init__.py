"""The databases that can hold the job table: transactions, clocks and change feeds."""
