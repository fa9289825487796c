#!/usr/bin/env bash
# Submits the run to a GKE cluster with Kueue and JobSet, by gcluster of the Cluster Toolkit.
#
#   launch/gcluster.sh [--dry-run] [--settings FILE] [--manifest FILE] [train|preflight]
#
# --manifest has gcluster write the manifest into FILE and submit nothing. gcluster fails a job at any
# exit code that is not named; named are 75 (stopped and saved), 124 (it hung) and what a process has
# that was killed (137, 143) or lost another one (134, 139). Needs gcluster of the Cluster Toolkit, v1.106
# or near.
#
# https://github.com/GoogleCloudPlatform/cluster-toolkit/blob/main/docs/gcluster_job_guide.md
# https://github.com/GoogleCloudPlatform/cluster-toolkit/blob/main/cmd/job/submit.go (flags)

# shellcheck source=launch/prelude.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/prelude.sh"

MANIFEST=()
OTHERS=()
while (($#)); do
  if [[ $1 == --manifest ]]; then
    [[ -n ${2:-} ]] || fail "--manifest needs a file to write"
    MANIFEST=(--dry-run-out "$2")
    shift 2
  else
    OTHERS+=("$1")
    shift
  fi
done
parse_options "${OTHERS[@]+"${OTHERS[@]}"}"
((${#OPERANDS[@]} <= 1)) || fail "too many words, ${OPERANDS[*]}: give train or preflight"
load_settings PROJECT CLUSTER LOCATION NAME ACCELERATOR TOPOLOGY NUM_SLICES IMAGE CONFIG WORKDIR \
  BUCKET MAX_RESTARTS GRACE_SECONDS
check_workdir
load_accelerator
check_nodes
load_flags
load_command "${OPERANDS[0]:-train}"
if [[ -n $LIBTPU_INIT_ARGS ]]; then
  COMMAND=(env "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS" "${COMMAND[@]}")
fi

# exec: bash of the pod becomes arcond, which then hears SIGTERM.
run gcluster job submit --name "$NAME" --project "$PROJECT" --cluster "$CLUSTER" \
  --location "$LOCATION" --compute-type "$MACHINE" --topology "$TOPOLOGY" \
  --num-slices "$NUM_SLICES" --image "$IMAGE" --command "exec $(quoted "${COMMAND[@]}")" \
  --restarts "$MAX_RESTARTS" --restart-on-exit-codes 75,124,134,137,139,143 \
  --grace-period "${GRACE_SECONDS}s" ${MANIFEST[@]+"${MANIFEST[@]}"}
