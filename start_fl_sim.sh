#!/bin/bash
# Runs a federation in NVFlare's simulator: clients are spread over the GPUs, or share the
# CPU where there is none. Ends with another status than 0 if results are missing.
if [[ $# -lt 3 ]]; then
  echo "usage: $0 N_CLIENTS JOB EXP_NAME" >&2
  exit 2
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONPATH="$(dirname "$(realpath "$0")")${PYTHONPATH:+:${PYTHONPATH}}"
exec "${PYTHON:-python3}" -m federated.simulate "$@"
