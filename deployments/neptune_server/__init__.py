"""A model registry on this machine for code that uses the `neptune` 1.x client.

See docs/how-to/run-the-neptune-compatible-server.md.
"""
