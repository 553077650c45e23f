#!/bin/sh
# Installs the distribution's SLURM, for a cluster on this machine. The tests skip without it, so this never fails.
set -- slurm-wlm munge iproute2 shellcheck
missing=""
for program in slurmctld slurmd munged ip shellcheck; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null 2>&1 && exit 0
fi
echo "The tests marked slurm will be skipped:$missing missing; on Debian: sudo apt-get install $*"
