#!/usr/bin/env bash
# One node, all its GPUs (or, with no GPU, CPU_RANKS processes). Started in the folder that data/ and runs/ are relative to:
#
#   launch/cluster/single_node.sh launch/configs/fbi_130m.yaml [section.key=value…]
#
# Stopped by a signal, all ranks save and leave. Started again, the run goes on from there.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$checkout/launch/supervise.sh"
export PATH=$checkout/.venv/bin:$PATH
export PYTHONWARNINGS="ignore::FutureWarning:torch.distributed.c10d_logger"

accelerators=()
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu
    accelerators=(--num_accelerators "${CPU_RANKS:-2}")
fi
supervise deepspeed -q --master_port "$(free_port)" "${accelerators[@]}" "$checkout/launch/pretrain.py" "$@"
