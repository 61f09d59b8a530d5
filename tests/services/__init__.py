"""Real servers that tests start, and a proxy that commits faults between a client and a server."""
