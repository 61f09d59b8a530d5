"""The four steps of the pipeline, as plain functions: fetch, compile, validate, register."""
