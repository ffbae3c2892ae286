#!/usr/bin/env bash
# Runs a job in NVFlare's simulator: ./start_fl_sim.sh N_CLIENTS JOB EXP_NAME
#
# The workspace is results/federated/N_CLIENTSclients_EXP_NAME. GRADINVBENCH_WORKSPACES names
# another folder for workspaces, PYTHON another interpreter.
set -euo pipefail

if [[ $# -ne 3 || ! "$1" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 N_CLIENTS JOB EXP_NAME" >&2
    exit 2
fi
n_clients=$1 job=$2 exp_name=$3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x "$here/.venv/bin/python" ]] && PYTHON="$here/.venv/bin/python"
fi
if [[ ! -f "$job/meta.json" ]]; then
    echo "error: JOB: $job is not a job folder (it has no meta.json)" >&2
    exit 2
fi
if ! "$PYTHON" -c 'import nvflare' 2>/dev/null; then
    echo "error: NVFlare is missing: pip install 'gradinvbench[federated]'" >&2
    exit 2
fi

root="${GRADINVBENCH_WORKSPACES:-$here/results/federated}"
mkdir -p "$root"
workspace="$(cd "$root" && pwd)/${n_clients}clients_${exp_name}"
# The simulator empties its workspace: results of an earlier run of this name step aside.
if [[ -e "$workspace" ]]; then
    mv "$workspace" "$workspace.$(date +%Y%m%d-%H%M%S)"
fi
export PYTHONUNBUFFERED=1 PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
# Deterministic matrix products on a GPU; threads that wait for each other are slow on a CPU.
export CUBLAS_WORKSPACE_CONFIG=:4096:8 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Older jobs have neither the folders nor the model that this NVFlare wants.
prepared="$workspace.job"
rm -rf "$prepared"
clients=$("$PYTHON" -m federated.prepare_job --job "$job" --n_clients "$n_clients" --output "$prepared")

# With fewer threads than clients, clients would take turns and be loaded anew each time.
command=("$PYTHON" -m nvflare.cli simulator "$prepared" -w "$workspace" -c "$clients" -t "$n_clients")

# Sites take the GPUs in turn.
n_gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | grep -c '^GPU' || true)
if [[ $n_gpus -gt 0 ]]; then
    gpus=$(for ((i = 0; i < n_clients; i++)); do echo $((i % n_gpus)); done | paste -sd, -)
    command+=(--gpu "$gpus")
fi
echo "$n_clients clients ($clients), $n_gpus GPUs, workspace $workspace"
"${command[@]}" || echo "the simulator ended with status $?" >&2

# The simulator's status says little: look at what the run has left behind.
"$PYTHON" -m federated.run_record --workspace "$workspace"
