"""The secrets that tests use. Whoever finds one of them in a log, a manifest or a report has found a leak.

`tests/leaks.py` searches everything that a test run wrote for these.
"""

from __future__ import annotations

AWS_ACCESS_KEY_ID = "AKIATESTONLYLEAKMARK"
AWS_SECRET_ACCESS_KEY = "leak-mark-aws-secret-4f1d9c27"  # noqa: S105 - it is no secret, that is the point
NEPTUNE_API_KEY = "leak-mark-neptune-key-8b02e6d5"
SIGNING_PASSWORD = "leak-mark-signing-password-c35a"  # noqa: S105 - it is no secret, that is the point
MLFLOW_PASSWORD = "leak-mark-mlflow-password-e7d4"  # noqa: S105 - it is no secret, that is the point
HF_TOKEN = "hf_leakmarkhubtoken71aa"  # noqa: S105 - it is no secret, that is the point

ALL = (AWS_SECRET_ACCESS_KEY, NEPTUNE_API_KEY, SIGNING_PASSWORD, MLFLOW_PASSWORD, HF_TOKEN)
