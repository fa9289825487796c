#!/usr/bin/env bash
# Runs a command of arcond as several CPU processes of this machine, as several hosts would.
#
#   launch/local_multiprocess.sh [--processes 2] [--devices 4] [--port 47823] [--logs FOLDER]
#       [--dry-run] -- train --config digits:joint --workdir runs/together
#
# Process 0 speaks here, the others into FOLDER/process_N.log. Exit code: 0 if all have 0, 75 if they
# stopped and saved, else that of the first that failed; the others are then ended.

# shellcheck source=launch/prelude.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/prelude.sh"

PROCESSES=2 DEVICES=4 PORT=47823 LOGS=""
while (($#)); do
  case $1 in
    --processes | --devices | --port)
      [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "$1 ${2:-} is no number: give one of at least 1"
      case $1 in --processes) PROCESSES=$2 ;; --devices) DEVICES=$2 ;; --port) PORT=$2 ;; esac
      shift 2
      ;;
    --logs)
      [[ -n ${2:-} ]] || fail "--logs needs a folder"
      LOGS=$2
      shift 2
      ;;
    --)
      shift
      break
      ;;
    *)
      [[ $1 != --settings ]] || fail "--settings is of the other scripts: give the command after --"
      common_option "$@"
      ((CONSUMED)) || fail "unknown option $1: --help shows what there is, a command comes after --"
      shift "$CONSUMED"
      ;;
  esac
done
(($#)) || fail "no command: give one of arcond after --, as in -- train --config digits:joint --workdir W"

XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"
command_of() { # process N, into COMMAND
  COMMAND=(env JAX_PLATFORMS=cpu "XLA_FLAGS=$XLA_FLAGS" "JAX_COORDINATOR_ADDRESS=localhost:$PORT"
    "JAX_NUM_PROCESSES=$PROCESSES" "JAX_PROCESS_ID=$1" "${@:2}")
}

if [[ -n $DRY_RUN ]]; then
  for ((i = 0; i < PROCESSES; i++)); do
    command_of "$i" arcond "$@"
    printf '%s &\n' "$(quoted "${COMMAND[@]}")"
  done
  echo wait
  exit 0
fi

command -v arcond >/dev/null || fail "arcond is not on PATH: source .venv/bin/activate"
if [[ -z $LOGS ]]; then LOGS=$(mktemp -d "${TMPDIR:-/tmp}/arcond_processes.XXXXXX"); fi
mkdir -p -- "$LOGS"
echo "logs of processes 1 to $((PROCESSES - 1)): $LOGS" >&2

# shellcheck disable=SC2317,SC2329  # the trap calls it
forward() { # a signal, to those that run
  local i
  for ((i = 0; i < ${#PIDS[@]}; i++)); do
    if [[ -z ${ENDED[i]:-} ]]; then kill "-$1" "${PIDS[i]}" 2>/dev/null || true; fi
  done
}
PIDS=() ENDED=()
for ((i = 0; i < PROCESSES; i++)); do
  command_of "$i" arcond "$@"
  if ((i)); then
    "${COMMAND[@]}" >"$LOGS/process_$i.log" 2>&1 &
  else
    "${COMMAND[@]}" &
  fi
  PIDS+=("$!")
done
trap 'forward TERM' TERM INT HUP # a background process of a script does not hear Ctrl-C

CODE=0 RUNNING=$PROCESSES DEADLINE=""
while ((RUNNING)); do
  sleep 0.2 || true
  for ((i = 0; i < PROCESSES; i++)); do
    if [[ -n ${ENDED[i]:-} ]] || kill -0 "${PIDS[i]}" 2>/dev/null; then continue; fi
    code=0
    wait "${PIDS[i]}" || code=$?
    ENDED[i]=yes RUNNING=$((RUNNING - 1))
    if ((code)); then
      if ((CODE == 0)); then CODE=$code; fi
      if ((code != 75)) && [[ -z $DEADLINE ]]; then
        CODE=$code DEADLINE=$((SECONDS + 30))
        echo "process $i ended with exit code $code" >&2
        if ((i)); then tail -n 3 "$LOGS/process_$i.log" >&2; fi
        forward TERM
      fi
    fi
  done
  if [[ -n $DEADLINE ]] && ((SECONDS > DEADLINE)); then forward KILL; fi
done
exit "$CODE"
