#!/usr/bin/env bash
# All tests: five runs of pytest, two at a time, since none keeps two cores busy by itself. Each prints what it has to
# say when it has ended. Words are pytest's own options, for all.
set -euo pipefail
cd "$(dirname "$0")/.."

# The longest first; the last two are short, so that both lines end at about the same time.
printf '%s\0' tests/integration tests/launch tests/unit 'tests/distributed/test_[a-l]*' 'tests/distributed/test_[m-z]*' |
    xargs -0 -P 2 -I {} bash -c '
        log=$(mktemp)
        trap "rm -f \"$log\"" EXIT
        failed=0
        files=$1 # a folder or a pattern
        shift
        .venv/bin/python -m pytest $files "$@" >"$log" 2>&1 </dev/null || failed=$?
        flock .venv/bin/python cat "$log"
        exit "$failed"' pytest {} "$@"
