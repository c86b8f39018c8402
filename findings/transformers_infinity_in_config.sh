#!/usr/bin/env bash
# A config.json that transformers 5 saves holds an object where a number was infinite, and only one of its readers
# turns it back.
#
#   findings/transformers_infinity_in_config.sh      (needs Python 3.11 and pip, no torch; some minutes, all of pip)
#
# Expected: what save_pretrained writes means the same to AutoConfig.from_pretrained and to from_dict of the file's
# content; JSON has no infinity, so a large number, null or the string "Infinity" stands for it.
# Seen: it is {"__float__": "Infinity"}. from_pretrained undoes it; from_dict (and every program that reads config.json
# by itself) refuses the field by its type, although it is the family's default: time_step_limit of the families with
# Mamba-2 layers (Granite 4, Nemotron-H).
#
# Seen on 2026-12-01 with transformers 5.17.0:
#   saved: [0.0, {'__float__': 'Infinity'}]
#   from_pretrained: [0.0, inf]
#   from_dict: StrictDataclassFieldValidationError
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check "transformers==5.17.0"
cat >"$work/config.py" <<'PYTHON'
import json
import pathlib
import sys

from transformers import AutoConfig, GraniteMoeHybridConfig

work = pathlib.Path(sys.argv[1])
GraniteMoeHybridConfig().save_pretrained(work)
raw = json.loads((work / "config.json").read_text())
print("saved:", raw.get("time_step_limit"))
print("from_pretrained:", list(AutoConfig.from_pretrained(work).time_step_limit))
try:
    print("from_dict:", GraniteMoeHybridConfig.from_dict(raw).time_step_limit)
except Exception as error:
    print("from_dict:", type(error).__name__)
PYTHON
seen=$("$work/venv/bin/python" "$work/config.py" "$work" 2>/dev/null)
echo "$seen"
if [[ $seen != *"{'__float__': 'Infinity'}"*"from_pretrained: [0.0, inf]"*"from_dict: StrictDataclass"* ]]; then
    echo "transformers saves or reads an infinite number in another way now: this finding is out of date" >&2
    exit 1
fi
