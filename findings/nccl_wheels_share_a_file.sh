#!/usr/bin/env bash
# nvidia-nccl-cu12 and nvidia-nccl-cu13 install the same file; the later one wins, and removing either removes both.
#
#   findings/nccl_wheels_share_a_file.sh      (needs Python 3.11 and pip, no GPU; installs 400 MB, about a minute)
#
# Expected: two distributions, two libraries, as for the rest of CUDA (nvidia/cu13/lib there), or a refusal by pip.
# Seen: both write nvidia/nccl/lib/libnccl.so.2. Where one package needs the one and another the other (a torch for
# CUDA 13, and cupy-cuda12x with nvidia-nccl-cu12), the library of the first is replaced by another release, for
# another CUDA. `pip list` and importlib.metadata go on naming the release that is gone, and `pip check` finds
# nothing. Uninstalling the newcomer leaves no library at all; pip still lists nvidia-nccl-cu13 as installed.
#
# Seen on 2026-12-01 with nvidia-nccl-cu13 2.32.3, nvidia-nccl-cu12 2.28.9:
#   cu13 alone:           metadata of cu13 says 2.32.3, libnccl says 2.32.3
#   cu12 installed too:   metadata of cu13 says 2.32.3, libnccl says 2.28.9
#   cu12 removed again:   metadata of cu13 says 2.32.3, libnccl says nothing: no such file
#   pip check, each time: No broken requirements found.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
python=$work/venv/bin/python
pip() {
    "$python" -m pip --disable-pip-version-check "$@"
}

cat >"$work/versions.py" <<'PYTHON'
import ctypes
import importlib.metadata
import pathlib
import sysconfig

path = pathlib.Path(sysconfig.get_path("purelib"), "nvidia/nccl/lib/libnccl.so.2")
number = ctypes.c_int()
if path.exists():
    ctypes.CDLL(str(path)).ncclGetVersion(ctypes.byref(number))
n = number.value
library = f"{n // 10000}.{n // 100 % 100}.{n % 100}" if path.exists() else "nothing: no such file"
print(f"metadata of cu13 says {importlib.metadata.version('nvidia-nccl-cu13')}, libnccl says {library}")
PYTHON

# look WHEN LIBRARY: fails if the library, the metadata or pip's opinion is another one than when this was found.
look() {
    local seen opinion
    seen=$("$python" "$work/versions.py")
    opinion=$(pip check) || true
    echo "$1: $seen, pip check: $opinion"
    if [ "$seen; $opinion" != "metadata of cu13 says 2.32.3, libnccl says $2; No broken requirements found." ]; then
        echo "the NCCL wheels no longer share a file, or pip notices: this finding is out of date" >&2
        exit 1
    fi
}

pip install -qq nvidia-nccl-cu13==2.32.3
look "cu13 alone" 2.32.3
pip install -qq nvidia-nccl-cu12==2.28.9
look "cu12 installed too" 2.28.9
pip uninstall -qq -y nvidia-nccl-cu12
look "cu12 removed again" "nothing: no such file"
