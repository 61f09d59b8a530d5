"""The MLflow registry, and the client that it shares with the MLflow source."""
