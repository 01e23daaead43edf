"""The HTTP routes, and what the routes of one gateway process share."""
