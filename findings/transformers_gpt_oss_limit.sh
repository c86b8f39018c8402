#!/usr/bin/env bash
# GPT-OSS of transformers clamps its experts at 7, whatever swiglu_limit of the config says.
#
#   findings/transformers_gpt_oss_limit.sh      (needs Python 3.11 and pip; some minutes, all of pip)
#
# Expected: swiglu_limit, which published configs have (7.0), is where experts clamp; or another number is refused.
# Seen: the experts have the limit as a constant. A config with another number is taken without a word, keeps its
# number, and computes with 7.
#
# Seen on 2026-12-01 with transformers 5.17.0 and torch 2.13.0:
#   swiglu_limit 7.0: clamped at 7.0    swiglu_limit 0.5: clamped at 7.0
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check "transformers==5.17.0" "torch==2.13.0"
cat >"$work/experts.py" <<'PYTHON'
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

for limit in (7.0, 0.5):
    config = GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=2, swiglu_limit=limit)
    gate_up = torch.tensor([[100.0, 100.0]])  # a gate and an up: the limit times (the limit + 1), where sigmoid is 1
    value = GptOssExperts(config)._apply_gate(gate_up).item()
    clamped = (-1 + (1 + 4 * value) ** 0.5) / 2
    print(f"swiglu_limit {config.swiglu_limit}: clamped at {clamped:.1f}")
PYTHON
seen=$("$work/venv/bin/python" "$work/experts.py" 2>/dev/null)
echo "$seen"
if [ "$seen" != "swiglu_limit 7.0: clamped at 7.0
swiglu_limit 0.5: clamped at 7.0" ]; then
    echo "transformers' GPT-OSS heeds swiglu_limit now, or refuses it: this finding is out of date" >&2
    exit 1
fi
