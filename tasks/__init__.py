"""One Prefect task a file: a decorator, a log line and one library call."""
