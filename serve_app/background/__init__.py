"""Background threads of a gateway process: long polls, event streams, webhooks, housekeeping, retention."""
