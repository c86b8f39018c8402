#!/usr/bin/env bash
# A MoE config that transformers 5 has saved means another model to transformers 4: 128 experts, another rotary base,
# no yarn.
#
#   findings/transformers_config_round_trip.sh      (needs Python 3.11 and pip, no torch; some minutes, all of pip)
#
# Expected: reading a config.json and saving it again keeps its keys; or, where they are renamed, an older reader
# stops at keys that it misses.
# Seen: transformers 5 writes Qwen3-MoE's num_experts as num_local_experts, and rope_theta and rope_scaling as
# rope_parameters. transformers 4 (and every program that reads config.json by the published names) takes its own
# defaults for what it does not find, without a word. Weights of another number of experts then fail by their shapes;
# a wrong rotary base fits all shapes and only makes the answers worse, the more the longer the prompt.
#
# Seen on 2026-12-01 with transformers 5.17.0 and 4.57.6:
#   as published:    transformers 4.57.6: num_experts 64, rope_theta 1000000.0; yarn factor 40.0
#   saved by 5.17.0: transformers 4.57.6: num_experts 128, rope_theta 10000.0; yarn factor None
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
for version in 5.17.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/python" -m pip install -qq --disable-pip-version-check "transformers==$version"
done

mkdir "$work/qwen3_moe" "$work/deepseek_v3"
cat >"$work/qwen3_moe/config.json" <<'JSON'
{"model_type": "qwen3_moe", "num_experts": 64, "num_experts_per_tok": 4, "rope_theta": 1000000.0}
JSON
cat >"$work/deepseek_v3/config.json" <<'JSON'
{"model_type": "deepseek_v3", "rope_theta": 10000.0, "max_position_embeddings": 163840,
 "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
                  "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}}
JSON
cat >"$work/config.py" <<'PYTHON'
import pathlib
import sys

from transformers import AutoConfig, __version__

task, work = sys.argv[1], pathlib.Path(sys.argv[2])
if task == "save":
    for family in ("qwen3_moe", "deepseek_v3"):
        AutoConfig.from_pretrained(work / family).save_pretrained(work / f"{family}_saved")
    raise SystemExit
qwen, deepseek = (AutoConfig.from_pretrained(work / f"{family}{task}") for family in ("qwen3_moe", "deepseek_v3"))
scaling = deepseek.rope_scaling and deepseek.rope_scaling["factor"]
print(f"transformers {__version__}: num_experts {qwen.num_experts}, rope_theta {qwen.rope_theta}; ", end="")
print(f"yarn factor {scaling}")
PYTHON
export PYTHONWARNINGS=ignore
"$work/5.17.0/bin/python" "$work/config.py" save "$work" 2>/dev/null
published=$("$work/4.57.6/bin/python" "$work/config.py" "" "$work" 2>/dev/null)
saved=$("$work/4.57.6/bin/python" "$work/config.py" _saved "$work" 2>/dev/null)
echo "as published:    $published"
echo "saved by 5.17.0: $saved"
if [ "$published" != "transformers 4.57.6: num_experts 64, rope_theta 1000000.0; yarn factor 40.0" ] ||
    [ "$saved" != "transformers 4.57.6: num_experts 128, rope_theta 10000.0; yarn factor None" ]; then
    echo "transformers saves or reads these configs in another way now: this finding is out of date" >&2
    exit 1
fi
