#!/usr/bin/env bash
# One machine:      DEVICES=8 examples/cluster/torchrun.sh --epochs 20
# Several machines: the same line on each, with NODES=4 MASTER=<name of the first machine>
set -euo pipefail

: "${NODES:=1}" "${DEVICES:=2}" "${MASTER:=127.0.0.1}" "${PORT:=29500}" "${RESTARTS:=3}"

# Each start gets a store of its own. In the shared one restarted processes can find the addresses
# of those that died, and hang (pytorch/pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# LOCAL_ADDR is for machines whose own name cannot be resolved by the others.
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "$NODES" --nproc-per-node "$DEVICES" --max-restarts "$RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER:$PORT" --rdzv-id "${JOB:-digits}" \
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    "$(dirname "$0")/train.py" --devices "$DEVICES" --num_nodes "$NODES" "$@"
