#!/usr/bin/env bash
# Phi-MoE of transformers sends every token to two experts, whatever num_experts_per_tok says.
#
#   findings/transformers_phimoe_top_k.sh      (needs Python 3.11 and pip; some minutes, all of pip)
#
# Expected: num_experts_per_tok of a PhimoeConfig is the number of experts of a token, as in all other families; or
# another number than 2 is refused.
# Seen: the router is called with top_k and says so in its attributes, but its function (sparsemixer) takes the largest
# logit and the one after it, always. A model of another number computes something else without a word, and code that
# allots room for K experts a token by the config finds two.
#
# Seen on 2026-12-01 with transformers 5.17.0 and torch 2.13.0:
#   num_experts_per_tok 1: 2 experts a token    num_experts_per_tok 4: 2 experts a token
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check "transformers==5.17.0" "torch==2.13.0"
cat >"$work/router.py" <<'PYTHON'
import torch
from transformers import PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

for count in (1, 4):
    config = PhimoeConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=count)
    _, _, ids = PhimoeTopKRouter(config).eval()(torch.randn(5, 32))
    print(f"num_experts_per_tok {count}: {ids.shape[1]} experts a token")
PYTHON
seen=$("$work/venv/bin/python" "$work/router.py" 2>/dev/null)
echo "$seen"
if [ "$seen" != "num_experts_per_tok 1: 2 experts a token
num_experts_per_tok 4: 2 experts a token" ]; then
    echo "transformers' Phi-MoE chooses another number of experts now: this finding is out of date" >&2
    exit 1
fi
