"""The secrets that tests use. One of them in a log, a manifest or a report is a leak.

`tests/leaks.py` searches everything that a test run wrote for these.
"""

from __future__ import annotations

AWS_ACCESS_KEY_ID = "AKIATESTONLYLEAKMARK"
AWS_SECRET_ACCESS_KEY = "leak-mark-aws-secret-4f1d9c27"  # noqa: S105 - it is public on purpose
NEPTUNE_API_KEY = "leak-mark-neptune-key-8b02e6d5"
SIGNING_PASSWORD = "leak-mark-signing-password-c35a"  # noqa: S105 - it is public on purpose
MLFLOW_PASSWORD = "leak-mark-mlflow-password-e7d4"  # noqa: S105 - it is public on purpose
HF_TOKEN = "hf_leakmarkhubtoken71aa"  # noqa: S105 - it is public on purpose

ALL = (AWS_SECRET_ACCESS_KEY, NEPTUNE_API_KEY, SIGNING_PASSWORD, MLFLOW_PASSWORD, HF_TOKEN)
