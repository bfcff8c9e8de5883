#!/usr/bin/env bash
# A GPU lent for a quarter of an hour: two calls of at most six minutes each.
#
#   benchmarks/gpu_session.sh first OUT               # right? then what it costs
#   benchmarks/gpu_session.sh second OUT [STAGE ...]  # the stages named first, then backward, tuning, sanitizers
#   benchmarks/gpu_session.sh first OUT --dry         # the same code on a CPU, at tiny sizes
#
# Results go to OUT as JSON while they come, a table is printed last. See docs/gpu.md. Needs no network: the packages
# that are there are used (torch 2.11 with triton 3.6 is enough). Compiled kernels and the extension are taken from
# build/gpu/carried.tar.xz (made elsewhere by benchmarks/gpu/carry.py) where it is there; what is missing is compiled.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
[ $# -ge 2 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }

case " $* " in
    *" --dry "*) ;;
    *)
        archive=build/gpu/carried.tar.xz
        if [ -e "$archive" ]; then
            export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/gptkern_triton_cache}
            python3 benchmarks/gpu/archive.py "$archive" "$TRITON_CACHE_DIR"
        fi
        python3 -c 'from gptkern._native import extension as e; raise SystemExit(e is None or not e.has_cuda)' 2>/dev/null ||
            GPTKERN_CUDA=1 GPTKERN_CUDA_ARCHS=${GPTKERN_CUDA_ARCHS:-90} python3 setup.py -q build_ext --inplace
        ;;
esac
exec python3 benchmarks/gpu/session.py "$@"
