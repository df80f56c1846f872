#!/usr/bin/env bash
# All tests: a run of pytest for each folder, two at a time, since none keeps two cores busy by itself. Each prints what
# it has to say when it has ended. Words are pytest's own options, for all.
set -euo pipefail
cd "$(dirname "$0")/.."

# In this order the two lines of runs end at about the same time.
printf '%s\0' tests/launch tests/unit tests/integration tests/distributed |
    xargs -0 -P 2 -I {} bash -c '
        log=$(mktemp)
        trap "rm -f \"$log\"" EXIT
        failed=0
        .venv/bin/python -m pytest "$@" >"$log" 2>&1 </dev/null || failed=$?
        flock .venv/bin/python cat "$log"
        exit "$failed"' pytest {} "$@"
