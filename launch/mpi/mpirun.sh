#!/usr/bin/env bash
# Started by mpirun (MPICH, Intel MPI or Open MPI) instead of srun or torchrun.
#   launch/mpi/mpirun.sh RANKS CONFIG.toml [--section.key=value ...]
# RANKS must equal parallel.tensor x parallel.pipeline x parallel.context x parallel.data. For several hosts, pass
# mpirun's own options in RPP_MPIRUN_ARGS (such as "--hostfile hosts"). `python -m mpi4py` ends all ranks when one
# fails; plain python would hang.
# RPP_ATTEMPT names this start on every rank, whichever MPI it is.
set -euo pipefail
ranks=$1
shift
# RPP_MPIRUN_ARGS is split into words on purpose.
# shellcheck disable=SC2086
exec mpirun -n "$ranks" ${RPP_MPIRUN_ARGS:-} \
    env RPP_ATTEMPT="${RPP_ATTEMPT:-mpi-$(date +%Y%m%d-%H%M%S)-$$}" python -m mpi4py -m megatron_rpp.cli train "$@"
