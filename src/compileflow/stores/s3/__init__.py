"""The S3 store: one layout with the local store, over boto3."""
