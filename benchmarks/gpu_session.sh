#!/usr/bin/env bash
# Everything that a short hour with a GPU should do, in stages that each end within nine minutes.
#
#   benchmarks/gpu_session.sh OUT            # all stages, results in the folder OUT
#   benchmarks/gpu_session.sh OUT build test # these stages alone
#
# Stages: build test sanitize quick bench-ops bench-end profile. Needs no network: the packages that
# are there are used (torch 2.11 with triton 3.6 is enough). A stage that fails does not stop the next.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: benchmarks/gpu_session.sh OUT [STAGE ...]}")
shift
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build test sanitize quick bench-ops bench-end profile)
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
limit="timeout --kill-after=10 530"

build() { GPTKERN_CUDA=1 GPTKERN_CUDA_ARCHS=${GPTKERN_CUDA_ARCHS:-90} python3 setup.py build_ext --inplace; }
tests() { $limit python3 -m pytest tests -n 8 -q -m "not slow" -p no:cacheprovider; }
sanitize() {
    for tool in memcheck racecheck; do
        $limit compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python3 -m pytest tests/ops -n 0 -q -x -k "sanitize or sample" -p no:cacheprovider || return 1
    done
}
quick() { $limit python3 -m gptkern bench --quick --out "$out/quick"; }
bench() { $limit python3 -m gptkern bench "$@" --out "$out/$1"; }
profile() {
    for kernel in flash_attention layer_norm gelu_mlp decode_attention; do
        $limit ncu --clock-control none --set basic --launch-count 20 \
            python3 -m gptkern bench "$kernel" --quick || return 1
    done
}

failed=0
for stage in "${stages[@]}"; do
    log="$out/$stage.log"
    began=$SECONDS
    case $stage in
        build) build ;;
        test) tests ;;
        sanitize) sanitize ;;
        quick) quick ;;
        bench-ops) bench layer_norm && bench flash_attention && bench linear && bench gelu_mlp ;;
        bench-end) bench decode_attention && bench prefill && bench generate && bench train_step ;;
        profile) profile ;;
        *) echo "unknown stage $stage" >&2; exit 2 ;;
    esac >"$log" 2>&1
    code=$?
    [ $code -eq 0 ] || failed=1
    printf '%-10s exit %s, %ss, last lines:\n' "$stage" "$code" "$((SECONDS - began))"
    tail -n 5 "$log"
done
exit $failed
