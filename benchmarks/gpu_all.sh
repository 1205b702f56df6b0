#!/usr/bin/env bash
# Tune, measure and prove on one GPU within nine minutes, from a plain checkout and the wheels in .whl:
#
#     bash benchmarks/gpu_all.sh [--help] [--list] [--dry] [--seconds N] [--again STEP] [STEP ...]
#
# A second call continues where the first one stopped. PYTHON names the interpreter; everything else
# is in benchmarks/gpu_all.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
    echo "gpu_all.sh: there is no '$python' here; PYTHON names the interpreter" >&2
    exit 2
fi
export PYTHONPATH=$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m benchmarks.gpu_all "$@"
