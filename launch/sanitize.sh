#!/usr/bin/env bash
# Runs small launches of every kernel family on a GPU under NVIDIA's compute-sanitizer: memcheck, racecheck, or the tools
# named. Without compute-sanitizer it says so, checks nothing and exits 0.
#
#   launch/sanitize.sh [memcheck | racecheck | synccheck | initcheck ...]      (default: memcheck racecheck)
#
#   PIPEMOE_PYTHON  a Python with everything installed, instead of the checkout's .venv
#   PIPEMOE_SANITIZER_FAMILIES  of tests/kernels/sanitizer_cases.py, as pytest's -k takes them
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
. launch/environment.sh
[ $# -gt 0 ] || set -- memcheck racecheck

sanitizer=$(PATH="$PATH:/usr/local/cuda/bin" command -v compute-sanitizer) || {
    echo "sanitize.sh: no compute-sanitizer on PATH or in /usr/local/cuda/bin; nothing checked" >&2
    exit 0
}
export CUDA_MODULE_LOADING=LAZY # of torch's kernels none is checked
failed=()
for tool in "$@"; do
    echo "== $tool"
    "$sanitizer" --tool "$tool" --kernel-name regex=pipemoe_kernels --launch-timeout 60 --print-limit 20 --error-exitcode 9 \
        "$python" -m pytest -q -p no:cacheprovider ${PIPEMOE_SANITIZER_FAMILIES:+-k "$PIPEMOE_SANITIZER_FAMILIES"} \
        tests/kernels/sanitizer_cases.py || failed+=("$tool")
done
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}"
    exit 1
fi
