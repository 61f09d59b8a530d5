"""Model registries: named, numbered versions of compiled models."""
