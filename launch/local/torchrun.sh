#!/usr/bin/env bash
# One host, started by torchrun instead of rpp's own launcher.
#   launch/local/torchrun.sh RANKS CONFIG.toml [--section.key=value ...]
# RANKS must equal parallel.tensor x parallel.pipeline x parallel.context x parallel.data.
set -euo pipefail
ranks=$1
shift
exec torchrun --standalone --nproc-per-node "$ranks" -m megatron_rpp.cli train "$@"
