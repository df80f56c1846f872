#!/usr/bin/env bash
# SLURM's daemons and `ip`, for the tests that run a real cluster on this machine (Debian or Ubuntu; under 15 MB).
# Nothing to do where they are there.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

PROGRAMS=(slurmctld slurmd srun ip)
PACKAGES=(slurmctld slurmd slurm-client munge iproute2)

missing() {
    for program in "${PROGRAMS[@]}"; do
        command -v "$program" >/dev/null || printf '%s ' "$program"
    done
}
fail() {
    printf 'slurm: error: %s: missing; %s\n' "$(missing)" "$1" >&2
    exit 2
}

[ -n "$(missing)" ] || exit 0
command -v apt-get >/dev/null || fail "install SLURM (slurmctld, slurmd, srun) and iproute2 with this system's packages"
sudo=()
if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || fail "as root, run: apt-get install -y --no-install-recommends ${PACKAGES[*]}"
    sudo=(sudo -n)
fi
log=$(mktemp)
get() {
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get "$@" >>"$log" 2>&1
}
printf 'slurm: installing %s\n' "${PACKAGES[*]}"
install=(install -y --no-install-recommends "${PACKAGES[@]}")
get "${install[@]}" || { get update && get "${install[@]}"; } || {
    tail -n 5 "$log" >&2
    fail "apt-get could not install it; the whole log is $log"
}
[ -z "$(missing)" ] || fail "apt-get has not brought it; the log is $log"
rm -f "$log"
