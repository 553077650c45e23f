# shellcheck shell=bash
# What the jobs of this folder do: find Python, check the nodes, start one task per GPU, come back after a stop.
# Sourced by the *.slurm files in the repository's root; what a user may set is MIXMIM_* (SLURM.md).

set -u -o pipefail

EXIT_MISTAKE=2
EXIT_REQUEUE=85 # stopped on request with everything saved (mixmim_ds/train/distributed.py)
LIMIT=${MIXMIM_MAX_STARTS:-3} # starts of one job from the same checkpoint
code=0 running='' signalled='' stopping=''

# run_job SCRIPT [key=value ...]: all that a job does; the last value of an option holds.
run_job() {
    trap on_signal USR1 TERM
    local script=$1
    shift
    local run_dir=runs/$SLURM_JOB_NAME logs word
    for word in "$@"; do
        [[ $word =~ ^\+{0,2}run_dir=(.*)$ ]] && run_dir=${BASH_REMATCH[1]}
    done
    [[ -n $run_dir ]] || fail "run_dir is not set; add run_dir=DIR, the folder that the run is kept in."
    [[ $run_dir =~ ^\~(/|$) ]] && run_dir=$HOME${run_dir:1} # as mixmim_ds/compose.py does
    run_dir+=${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID} # the jobs of an array are runs of their own
    set -- "$@" "run_dir=$run_dir"
    logs=$run_dir/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    activate
    count_tasks
    set_environment
    note_start
    say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $tasks tasks with $cpus cores each, logs in $logs"
    check_nodes "$script" "$@"
    ((code == 0)) || [[ -n $stopping ]] || exit "$code"
    if [[ -n $stopping ]]; then code=$EXIT_REQUEUE; else train "$script" "$@"; fi
    end_job
}

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $1"; }

fail() {
    echo "error: $1" >&2
    exit "${2:-$EXIT_MISTAKE}"
}

# To this script a signal comes alone (scancel --batch, --signal=B:USR1@...); the tasks must hear of it.
on_signal() {
    signalled=yes stopping=yes
    say "asked to stop"
    [[ -n $running ]] && kill -USR1 "$running" 2>/dev/null
}

# `python` becomes that of MIXMIM_ENV, a script to source, or that of .venv here, or stays the one on PATH.
activate() {
    local script=${MIXMIM_ENV:-} needed='"deepspeed", "hydra", "timm", "nvidia.dali"'
    [[ -z $script && -f .venv/bin/activate ]] && script=.venv/bin/activate
    unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT # of the shell that submitted; the script may set its own
    if [[ -n $script ]]; then
        [[ -f $script ]] || fail "MIXMIM_ENV=$script is no file; name a script that activates the environment (SLURM.md)."
        set +u # conda's and modules' scripts read variables that may be unset
        # shellcheck source=/dev/null
        source "$script" || fail "MIXMIM_ENV=$script failed; mend it."
        set -u
    fi
    read -ra prefix <<<"${MIXMIM_PREFIX:-}"     # words before python: a container's exec
    read -ra srun_options <<<"${MIXMIM_SRUN:-}" # options of srun: Pyxis' --container-image, in which python is found
    [[ -n ${MIXMIM_SRUN:-} ]] ||
        "${prefix[@]}" python -c "import importlib.util as u; assert all(map(u.find_spec, ($needed)))" 2>/dev/null ||
        fail "python lacks one of $needed; make setup, or let MIXMIM_ENV name a script that activates the environment."
}

# One task per GPU that SLURM gives on a node; without GPUs --ntasks-per-node of them, or one, on the CPU.
count_tasks() {
    local gpus=${SLURM_GPUS_ON_NODE:-0}
    per_node=$((gpus > 0 ? gpus : ${SLURM_NTASKS_PER_NODE:-1}))
    tasks=$((per_node * SLURM_JOB_NUM_NODES))
    cpus=$((SLURM_CPUS_ON_NODE / per_node))
    ((cpus > 0)) || cpus=1
}

set_environment() {
    mkdir -p "$logs" || fail "run_dir=$run_dir cannot be written; choose another run_dir."
    export PYTHONUNBUFFERED=1             # the last words of a task that dies
    export PYTHONFAULTHANDLER=1           # ... and its stack, if a library crashes
    export OMP_NUM_THREADS=$cpus          # or every task starts a thread for each core of its node
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # says why NCCL fails; INFO also tells which network it has found
    # Compiled kernels on the node's own disk: in a shared home the ranks would wait for each other's locks.
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}
}

newest() { cat "$run_dir/checkpoints/latest" 2>/dev/null || echo nothing; }

# How many of the last starts were this job's and began where the next one would.
starts() { tail -n "$LIMIT" "$run_dir/starts.log" 2>/dev/null | grep -c "job $SLURM_JOB_ID .* from $(newest)\$"; }

# The limit is kept in the run folder, for it also counts the starts after which SLURM itself requeued (a lost node).
check_limit() {
    (($(starts) < LIMIT)) || fail "$LIMIT starts of this job from $(newest) added no checkpoint; see $logs/.. and submit anew." 1
}

note_start() {
    check_limit
    echo "$(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST from $(newest)" >>"$run_dir/starts.log"
}

# start [option of srun ...] python SCRIPT [key=value ...]: runs it on all tasks, in the background. Told how many cores a
# task has, srun binds it to them where the cluster can (--cpu-bind), and our ranks start as many threads.
start() {
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$tasks" --ntasks-per-node="$per_node" --cpus-per-task="$cpus" \
        --distribution=block "${srun_options[@]}" "$@" &
    running=$!
    [[ -n $stopping ]] && kill -USR1 "$running"
}

# Waits for the tasks and sets `code`; a signal interrupts bash's own `wait`.
await() {
    local status
    while true; do
        signalled=
        wait "$running"
        status=$?
        ((status == 127)) || code=$status # 127: it was waited for already
        [[ -n $signalled ]] || break
    done
    running=
}

# A node that cannot write to the run folder must be able to say so, so all print here.
check_nodes() {
    local script
    script=$(basename "$1" .py)
    shift
    start --kill-on-bad-exit=0 "${prefix[@]}" python launch/healthcheck.py --of "$script" "$@"
    await
}

# Every task has a log; that of rank 0, and in the end errors of the others, are shown here too.
train() {
    local shown
    : >"$logs/rank_0.log"
    start --kill-on-bad-exit=1 --output="$logs/rank_%t.log" "${prefix[@]}" python "$@"
    tail --lines=+1 --follow --pid="$running" "$logs/rank_0.log" 2>/dev/null &
    shown=$!
    await
    wait "$shown"
    ((code == 0 || code == EXIT_REQUEUE)) || errors | head -n 3
}

# Those of the ranks but the first, causes before what followed from them.
errors() {
    grep -hs '^error: ' "$logs"/rank_[1-9]*.log | sort -u |
        awk '/ waited in vain / { followed = followed $0 "\n"; next } { print } END { printf "%s", followed }'
}

# Finished and mistaken jobs end here; all others go on later, unless that has been tried too often.
end_job() {
    local queued
    case $code in
    0) say "finished" && exit 0 ;;
    "$EXIT_MISTAKE") exit "$code" ;;
    "$EXIT_REQUEUE") say "stopped on request, saved as $(newest)" ;;
    *) say "ended with code $code; the newest checkpoint is $(newest)" ;;
    esac
    check_limit
    queued=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) ||
        say "not queued again by itself (${queued//$'\n'/ }); if squeue does not show it, submit the same command"
    exit "$code"
}
