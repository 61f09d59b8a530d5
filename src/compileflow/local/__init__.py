"""Compile from memory, without a flow: pipeline(), optimize(), from_model and from_pipeline."""
