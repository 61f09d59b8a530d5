"""Real servers that tests start, and the faults that they put between a client and a server."""
