"""The compiled model on disk: its manifest, its integrity, and how it is found and opened."""
