"""The S3 store: the same layout as the local store, on S3 or a compatible server, through boto3."""
