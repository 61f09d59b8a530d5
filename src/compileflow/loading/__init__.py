"""Open an artifact: check every byte, load its graphs, and fit any batch to what they take."""
