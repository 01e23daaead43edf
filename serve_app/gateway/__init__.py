"""The HTTP routes, and the state that the routes of one gateway process share."""
