"""Places that an uncompiled model comes from."""
