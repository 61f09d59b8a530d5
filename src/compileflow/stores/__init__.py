"""Artifact stores: write-once, content-addressed folders, locally or on S3."""
