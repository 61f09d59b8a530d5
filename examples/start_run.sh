#!/bin/sh
# Start a compile over Prefect's API with curl: sh examples/start_run.sh MODEL NAME
# PREFECT_API_URL and PREFECT_API_AUTH_STRING name the server; `make serve` keeps both in a file.
set -eu
[ $# -eq 2 ] || { echo "usage: sh $0 MODEL NAME" >&2; exit 2; }
call() { curl -sS --fail-with-body --retry 5 --noproxy '*' --user "${PREFECT_API_AUTH_STRING:-}" "$@"; }
id=$(call "$PREFECT_API_URL/deployments/name/compile-model/compile-model" | sed -E 's/^\{"id":"([^"]+)".*/\1/')
# The server starts one run for a key, even if curl has to send the request again.
key=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
call --header 'Content-Type: application/json' "$PREFECT_API_URL/deployments/$id/create_flow_run" \
  --data "{\"idempotency_key\": \"$key\", \"parameters\": {\"request\": {\"model\": \"$1\", \"name\": \"$2\"}}}"
