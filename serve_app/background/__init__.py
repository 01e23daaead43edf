"""The threads of a gateway process: long polls, event streams, webhooks, retention."""
