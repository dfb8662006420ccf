#!/usr/bin/env bash
# Everything there is to measure on one GPU, in twelve minutes: first whether results are right, then how fast they come.
#
#   evals/bench/gpu.sh [FOLDER [PART...]]
#
# Results go to FOLDER (default: runs/gpu), one JSON for each part, written row by row; parts are check, op and step. Only
# done where they are named: int8, packed keys of a call in eight bits; compiled, a step that is; wide, more contexts of
# batch 8; prefill, a prompt's attention by blocks and the first token, in six minutes; serve, sixteen requests by
# continuous batching, in five; parallel, a step on two GPUs, in four; kernels, the parts of a decode call with other sizes
# of their programs; and ahead, what fetching rows of host memory before they are needed would give, or narrower ones.
#
# Needs torch with CUDA, transformers and matplotlib; the package itself need not be installed. Started again, it goes on
# where it was stopped. PYTHON names the interpreter (default: python3).
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${1:-runs/gpu}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$out"

# part SECONDS COMMAND...: a limit that ends a part even where a row takes forever
part() {
    local limit=$1
    shift
    echo "== $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/log" | grep --line-buffered -v -i warning
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || echo "== ended with exit code $code, 124 at its limit of $limit s" | tee -a "$out/log"
    return "$code"
}

# measured SECONDS COMMAND...: what its limit ends has kept every row that was finished, so that is no failure
measured() {
    part "$@" || [ $? -eq 124 ] || status=1
}

bench=("$python" -m fasa_flex.bench --device cuda --dtype bfloat16 --shapes llama-3.1-8b)
status=0

check() {
    part 150 "$python" -m evals.bench.check_cuda --out "$out" --seconds 120 || status=1
    part 200 "$python" -m evals.bench.check_generate || status=1
}

# one attention call: with every rival; then the cheaper ranking, with the kernels alone
op() {
    local call=("${bench[@]}" --part op --batches 1,8)
    measured 150 "${call[@]}" --out "$out" --contexts 32k,128k,4k --row-seconds 2 --seconds 110
    call+=(--modes eager --backends triton --group-reduce max --row-seconds 1)
    measured 60 "${call[@]}" --out "$out/max" --contexts 32k,128k,4k --seconds 35
}

int8() {
    local call=("${bench[@]}" --part op --batches 1,8 --modes eager --backends triton --group-reduce max)
    measured 70 "${call[@]}" --out "$out/int8" --packed-dtype int8 --contexts 32k,128k,4k --row-seconds 1
}

wide() {
    measured 120 "${bench[@]}" --part op --out "$out/wide" --batches 8 --contexts 128k,64k,16k --row-seconds 1
    local whole=("${bench[@]}" --part step --modes eager --row-seconds 2 --out "$out/wide")
    measured 180 "${whole[@]}" --batches 8 --contexts 128k,64k,16k
}

# a whole decode step, replayed as a graph. What was pinned of the host's memory takes a quarter of a minute to give back
step() {
    local whole=("${bench[@]}" --part step --modes eager --row-seconds 2 --out "$out")
    measured 115 "${whole[@]}" --batches 1 --contexts 128k,32k,4k --seconds 75
    measured 115 "${whole[@]}" --batches 8 --contexts 32k,4k --seconds 45
}

# a whole model compiles for minutes; eight of its layers say what compiling gives
compiled() {
    local whole=("${bench[@]}" --part step --modes eager,compiled --row-seconds 2)
    whole+=(--layers 8 --dense-layers 0 --out "$out/compiled")
    measured 200 "${whole[@]}" --batches 1 --contexts 128k
    measured 200 "${whole[@]}" --batches 8 --contexts 32k
}

prefill() {
    part 150 "$python" -m evals.bench.check_prefill || status=1
    measured 290 "${bench[@]}" --part prefill --batches 1 --row-seconds 3 --seconds 200 --out "$out"
}

kernels() {
    local sizes=(--set SCORE_BLOCK=512 --set SCORE_BLOCK=512,SCORE_WARPS=8 --set SCORE_STAGES=2 --set SCORE_STAGES=4)
    sizes+=(--set SCORE_PROGRAMS=1024 --set MOST_STEPS=16 --set FOLD=1 --set FOLD=2 --set SUM_BLOCK=128)
    sizes+=(--set MANY_BLOCKS=1 --set MANY_BLOCKS=1048576)
    sizes+=(--set LIST_KEYS=2048 --set LIST_WARPS=4 --set SEGMENTS=8 --set FEW_SEGMENTS=4 --set SELECT_CHUNK=512)
    sizes+=(--set ATTEND_BLOCK=64 --set ATTEND_PROGRAMS=64 --set ATTEND_PROGRAMS=256 --set ATTEND_WARPS=8)
    sizes+=(--set LEAST_SPAN=32 --set MERGE_WARPS=2 --set MERGE_WARPS=4)
    measured 170 "$python" -m evals.bench.kernels --out "$out" "${sizes[@]}"
}

serve() {
    local served=("${bench[@]}" --part serve --layers 8 --batches 16 --new-tokens 256 --out "$out")
    measured 80 "${served[@]}" --contexts 2k --row-seconds 20
    measured 240 "${served[@]}" --contexts 32k --row-seconds 20
}

parallel() {
    measured 240 "$python" -m evals.bench.tensor_parallel --rounds 15 --out "$out"
}

ahead() {
    measured 100 "$python" -m evals.bench.ahead --out "$out"
}

for wanted in "${@:2}"; do "$wanted"; done
[ $# -gt 1 ] || for wanted in check op step; do "$wanted"; done

ls -l "$out"
exit "$status"
