#!/usr/bin/env bash
# Everything there is to measure on one GPU, in ten minutes: first whether results are right, then how fast they come.
#
#   evals/bench/gpu.sh [FOLDER]      results go to FOLDER (default: runs/gpu), one JSON for each part, written row by row
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
    timeout --kill-after=10 "$limit" "$@" 2>&1 | grep --line-buffered -v -i warning | tee -a "$out/log"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || echo "== ended with exit code $status" | tee -a "$out/log"
    return "$status"
}

bench=("$python" -m fasa_flex.bench --device cuda --dtype bfloat16 --shapes llama-3.1-8b --out "$out")
step=("${bench[@]}" --part step --row-seconds 3)
status=0
part 160 "$python" -m evals.bench.check_cuda --out "$out" --seconds 140 || status=1
part 150 "${bench[@]}" --part op --batches 1,8 --contexts 4k,32k,128k,16k,64k,8k --row-seconds 2 --seconds 125 || status=1
# eager steps are replayed as graphs; of FASA's backends only the kernels can be captured whole
part 130 "${step[@]}" --modes eager --backends triton --batches 1 --contexts 32k,128k,4k,64k,16k --seconds 100 || status=1
part 60 "${step[@]}" --modes eager --backends triton --batches 8 --contexts 32k,4k --seconds 40 || status=1
# a whole model compiles for minutes; four of its layers say what compiling gives
part 90 "${step[@]}" --out "$out/compiled" --modes compiled --layers 4 --batches 1 --contexts 32k || status=1

ls -l "$out" "$out/compiled"
exit "$status"
