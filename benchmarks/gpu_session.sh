#!/usr/bin/env bash
# Everything that a short hour with a GPU should do, in stages that each end within nine minutes.
#
#   benchmarks/gpu_session.sh OUT             # all stages, results in the folder OUT
#   benchmarks/gpu_session.sh OUT build test  # these stages alone
#
# Stages: build test sanitize costs soak quick bench-SUITE (one for each suite of gptkern bench) drop-in token ncu
# tune-OP (one for each op with rows in the launch table). Needs no network: the packages that are there are
# used (torch 2.11 with triton 3.6 is enough; tests want pytest and hypothesis). A stage that fails does not
# stop the next. Tuning goes on, in OUT/launch.toml, where the time of an earlier stage ended.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: benchmarks/gpu_session.sh OUT [STAGE ...]}")
shift
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
suites="layer_norm rms_norm flash_attention linear gelu_mlp linear_cross_entropy decode_attention
    sample prefill decode_step generate train_step"
tuned="decode_linear decode_attention flash_attention linear gelu_mlp linear_cross_entropy layer_norm rms_norm"
stages=("$@")
# shellcheck disable=SC2086  # words are wanted
[ ${#stages[@]} -gt 0 ] || stages=(build test sanitize costs soak quick $(printf 'bench-%s ' $suites) drop-in token ncu $(printf 'tune-%s ' $tuned))
mkdir -p "$out"

seconds=530
limited() { timeout --kill-after=10 "$seconds" "$@"; }
# Without the options of pyproject.toml: they ask for plugins that may not be there.
tests() { limited python3 -m pytest -o addopts= -p no:cacheprovider -q -m "not slow" "$@"; }

build() { GPTKERN_CUDA=1 GPTKERN_CUDA_ARCHS=${GPTKERN_CUDA_ARCHS:-90} limited python3 setup.py build_ext --inplace; }
test_all() {
    local workers=()
    python3 -c "import xdist" 2>/dev/null && workers=(-n 8)
    tests "${workers[@]}" tests
}
sanitize() {
    local seconds=250
    for tool in memcheck racecheck; do
        limited compute-sanitizer --tool "$tool" --error-exitcode 1 python3 -m pytest -o addopts= \
            -p no:cacheprovider -q -x -m "not slow" tests/ops/test_sample.py tests/ops/test_layer_norm.py || return 1
    done
}
bench() { limited python3 -m gptkern bench "$1" --out "$out/$1"; }
# What a grid barrier, a graph node and a dependent launch cost.
costs() {
    limited python3 -m pytest -o addopts= -p no:cacheprovider -q -s benchmarks/bench_launch_costs.py \
        --benchmark-json "$out/launch_costs.json"
}
# The persistent step must come back, 100,000 times, also when it shares the GPU.
soak() {
    local seconds=250
    limited python3 benchmarks/soak_persistent.py && limited python3 benchmarks/soak_persistent.py --beside
}
# generate of transformers before and after gptkern.accelerate
drop_in() {
    limited python3 -m pytest -o addopts= -p no:cacheprovider -q -s benchmarks/bench_transformers.py \
        --benchmark-json "$out/drop_in.json"
}
# Ended by its limit, it has written what it found, and the next one goes on.
tune() { limited python3 -m gptkern tune "$1" --table "$out/launch.toml" || [ $? -eq 124 ]; }
token() { limited python3 -m gptkern profile "ROMEO:" --dtype bfloat16 --trace "$out/token.json"; }
# The kernels by name, so that PyTorch's own in the ceilings and the peers are passed over.
ncu_figures() {
    local seconds=130
    while read -r suite kernel; do
        limited ncu --clock-control none --set basic --kernel-name "regex:$kernel" --launch-count 5 \
            --export "$out/$suite" --force-overwrite --page details python3 -m gptkern bench "$suite" --quick </dev/null || return 1
    done <<<'layer_norm ^norm_
flash_attention ^flash_attention_
gelu_mlp ^linear
decode_attention ^decode_attention_'
}

failed=0
for stage in "${stages[@]}"; do
    log="$out/$stage.log"
    began=$SECONDS
    case $stage in
        build) build ;;
        test) test_all ;;
        sanitize) sanitize ;;
        costs) costs ;;
        soak) soak ;;
        quick) limited python3 -m gptkern bench --quick --out "$out/quick" ;;
        bench-*) bench "${stage#bench-}" ;;
        drop-in) drop_in ;;
        tune-*) tune "${stage#tune-}" ;;
        token) token ;;
        ncu) ncu_figures ;;
        *) echo "unknown stage $stage" >&2; exit 2 ;;
    esac >"$log" 2>&1
    code=$?
    [ $code -eq 0 ] || failed=1
    printf '%-10s exit %s, %ss, last lines:\n' "$stage" "$code" "$((SECONDS - began))"
    tail -n 5 "$log"
done
exit $failed
