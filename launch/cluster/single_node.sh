#!/usr/bin/env bash
# One node, all its GPUs (or, with no GPU, CPU_RANKS processes). Started in the folder that data/ and runs/ are relative to:
#
#   launch/cluster/single_node.sh launch/configs/fbi_130m.yaml [section.key=value…]
#
# A stop signal to this script reaches every rank at once; they save at the next step border. Started again, the run goes on from there.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PATH=$checkout/.venv/bin:$PATH
export PATH
export PYTHONWARNINGS="ignore::FutureWarning:torch.distributed.c10d_logger"

# Not the launcher's default port, which another run on this node may hold.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
accelerators=()
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu
    accelerators=(--num_accelerators "${CPU_RANKS:-2}")
fi

# The launcher hands signals on one rank after the other, or not at all. In a process group of their own, all ranks get them together.
setsid deepspeed -q --master_port "$port" "${accelerators[@]}" "$checkout/launch/pretrain.py" "$@" </dev/null &
group=$!
trap 'kill -TERM -- "-$group" 2>/dev/null' INT TERM
status=0
wait "$group" || status=$?
while kill -0 -- "-$group" 2>/dev/null; do sleep 1; done # ranks that are still writing their checkpoint
exit "$status"
