"""The built-in targets, one file each."""
