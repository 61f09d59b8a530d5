"""A model-registry server that the `neptune` 1.x client talks to (docs/neptune-server.md)."""
