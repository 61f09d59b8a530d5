"""A model registry on this machine for code that uses the `neptune` 1.x client; see docs/neptune-server.md."""
