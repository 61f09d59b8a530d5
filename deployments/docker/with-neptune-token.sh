#!/bin/sh
# Run a command with the token that the Neptune-compatible server has written, if the caller sets none.
set -eu
if [ -z "${NEPTUNE_API_TOKEN:-}" ] && [ -r /neptune/token ]; then
    NEPTUNE_API_TOKEN="$(cat /neptune/token)"
    export NEPTUNE_API_TOKEN
fi
exec "$@"
