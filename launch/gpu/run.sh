#!/usr/bin/env bash
# One GPU host, all of its devices. Usage: launch/gpu/run.sh CONFIG WORKDIR [--config.key=value ...]
set -euo pipefail
[[ $# -ge 2 ]] || { echo "usage: $0 CONFIG WORKDIR [--config.key=value ...]" >&2; exit 2; }
config=$1 workdir=$2
shift 2

venv=${VENV:-$HOME/moresjax-venv}
if [[ ! -d $venv ]]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet -e ".[gpu]"
fi
# Most of the memory at once, so that it does not fragment.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
exec "$venv/bin/moresjax" train --config "$config" --workdir "$workdir" "$@"
