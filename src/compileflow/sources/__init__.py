"""Sources of uncompiled models: a local folder, the Hub, Neptune, MLflow, a registered version."""
