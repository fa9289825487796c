#!/usr/bin/env bash
# Asks the queue for TPU VMs (v5e, v5p, v6e), and runs on all workers of all their slices.
#
#   launch/queued_resource.sh [--dry-run] [--settings FILE] create|status|preflight|train|logs|stop|delete
#
# Slices are NAME-0, NAME-1, ...; one alone is NAME, as launch/tpu_vm.sh has it. What Spot takes away is
# not put back: delete, create and train again, and the run goes on from its checkpoint. TPU7x is had
# by GKE alone.
#
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create
# https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/ssh
# https://cloud.google.com/tpu/docs/runtimes (runtime versions)

# shellcheck source=launch/prelude.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/prelude.sh"
# shellcheck source=launch/workers.sh
source "$LAUNCH/workers.sh"

parse_options "$@"
load_settings PROJECT ZONE NAME ACCELERATOR TOPOLOGY PROVISIONING IMAGE CONFIG WORKDIR BUCKET \
  MAX_RESTARTS GRACE_SECONDS
check_workdir
load_accelerator
load_flags
case $PROVISIONING in
  on-demand) PROVISION=() ;;
  spot) PROVISION=(--spot) ;;
  reserved) PROVISION=(--reserved) ;;
esac

resources() { # a verb of gcloud, its arguments
  run gcloud compute tpus queued-resources "$1" "$NAME" --project "$PROJECT" --zone "$ZONE" "${@:2}"
}

on_workers() { # all or a number, a command line
  resources ssh --node "$1" --worker "$1" --command "$2"
}

NODES=(--node-id "$NAME")
if ((${NUM_SLICES:-1} > 1)); then NODES=(--node-count "$NUM_SLICES" --node-prefix "$NAME"); fi
VERBS="create, status, preflight, train, logs, stop and delete"
case ${OPERANDS[0]:-} in
  create)
    resources create "${NODES[@]}" --accelerator-type "$GCLOUD_TYPE" --runtime-version "$RUNTIME" \
      ${PROVISION[@]+"${PROVISION[@]}"}
    ;;
  status) resources describe --format "value(state.state)" ;;
  delete) resources delete --force --quiet ;;
  *) work "${OPERANDS[@]+"${OPERANDS[@]}"}" ;;
esac
