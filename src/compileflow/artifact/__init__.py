"""The compiled model on disk: how it is found, opened and verified; its manifest and its attestations."""
