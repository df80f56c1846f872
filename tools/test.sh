#!/usr/bin/env bash
# All tests, in two runs of pytest side by side: neither keeps two cores busy by itself. The second one's output comes
# when both have ended. Words are pytest's own options, for both.
set -euo pipefail
cd "$(dirname "$0")/.."

first=(tests/unit tests/distributed)
log=$(mktemp)
second=
trap 'test -z "$second" || kill "$second" 2>/dev/null || true; rm -f "$log"' EXIT

.venv/bin/python -m pytest "${first[@]/#/--ignore=}" "$@" >"$log" 2>&1 &
second=$!
failed=0
.venv/bin/python -m pytest "${first[@]}" "$@" || failed=$?
wait "$second" || failed=$?
second=
cat "$log"
exit "$failed"
