#!/usr/bin/env bash
# Several GPU hosts under Slurm, one process per host.
#   sbatch --nodes=2 launch/slurm/run.sh CONFIG WORKDIR [--config.key=value ...]
#SBATCH --job-name=moresjax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail
[[ $# -ge 2 ]] || { echo "usage: sbatch $0 CONFIG WORKDIR [--config.key=value ...]" >&2; exit 2; }
config=$1 workdir=$2
shift 2

venv=${VENV:-$HOME/moresjax-venv}
[[ -x $venv/bin/moresjax ]] || { echo "no moresjax in $venv; set VENV" >&2; exit 2; }
# Every process finds the others through Slurm's own variables.
exec srun --kill-on-bad-exit=1 "$venv/bin/moresjax" train --distributed --join-timeout 120 \
  --config "$config" --workdir "$workdir" "$@"
