#!/usr/bin/env bash
# Tune, measure and prove on one GPU within nine minutes, from a plain checkout and the wheels in .whl:
#
#     bash benchmarks/gpu_all.sh [--help] [--list] [--dry] [--seconds N] [--again STEP] [STEP ...]
#
# A second call continues where the first one stopped. PYTHON names the interpreter; everything else
# is in benchmarks/gpu_all.py.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

python=${PYTHON:-python3}
if ! PYTHON=$(command -v "$python"); then
    echo "gpu_all.sh: there is no '$python' here; PYTHON names the interpreter" >&2
    exit 2
fi
[[ $PYTHON == /* ]] || PYTHON=$PWD/$PYTHON # its programs run in the checkout
export PYTHON PYTHONPATH=$root/kernels:$root${PYTHONPATH:+:$PYTHONPATH}
# Files are named from where the script was called. -P: what lies there is not imported.
exec "$PYTHON" -P -m benchmarks.gpu_all "$@"
