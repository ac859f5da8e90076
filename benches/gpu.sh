#!/usr/bin/env bash
# Correctness first, then speed, on a machine with an NVIDIA GPU. Needs the release binary alone: no cargo, no network, no files.
#   benches/gpu.sh [path/to/strata] [folder for results]
# Steps can be chosen: STEPS="doctor verify models sanitizer operations speed quantize" benches/gpu.sh
set -uo pipefail
strata=$(realpath "${1:-target/release/strata}")
results=${2:-gpu-results}
steps=${STEPS:-doctor verify models sanitizer operations speed quantize}
device=${DEVICE:-cuda:0}
mkdir -p "$results"
cd "$results"
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$PWD/cache} XDG_DATA_HOME=${XDG_DATA_HOME:-$PWD/data}
summary=$PWD/summary.txt
: > "$summary"

note() { printf '%-34s %s\n' "$1" "$2" | tee -a "$summary"; }

# Runs a command, keeps its output, notes the time it took and whether it ended well.
step() {
    local name=$1 start=$SECONDS
    shift
    if timeout "${LIMIT:-300}" "$@" > "$name.txt" 2> "$name.log"; then
        note "$name" "ok, $((SECONDS - start)) s"
    else
        note "$name" "FAILED (exit $?), $((SECONDS - start)) s: $(tail -n 1 "$name.log")"
    fi
}

wanted() { [[ " $steps " == *" $1 "* ]]; }

if wanted doctor; then
    command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$summary"
    step doctor "$strata" doctor
fi

if wanted verify; then
    step verify "$strata" bench --verify --device "$device"
    grep -h FAIL verify.txt | head -n 40
    tail -n 1 verify.txt | tee -a "$summary"
fi

# The demo model in every format on both devices, and the largest difference of a logit.
if wanted models; then
    echo '{"input_ids": [[1, 17, 200, 33, 404, 5, 61, 78, 90, 111, 12, 340, 56, 7, 88, 9, 10, 211, 12, 313, 14, 15, 160, 170]]}' > ids.json
    for recipe in base rtn-w8a8 rtn-w4a8 phase1 phase2 phase3; do
        model=demo
        if [ "$recipe" != base ]; then
            model=$PWD/variant-$recipe
            [ -d "$model" ] || "$strata" quantize demo --recipe "$recipe" -o "$model" --sequences 4 --length 64 > /dev/null 2> "quantize-$recipe.log" \
                || note "quantize $recipe" "FAILED: $(tail -n 1 "quantize-$recipe.log")"
        fi
        for where in cpu "$device"; do
            "$strata" trace "$model" --ids ids.json -o "trace-$recipe-${where%%:*}.safetensors" --device "$where" > /dev/null 2> "trace-$recipe-${where%%:*}.log" \
                || note "trace $recipe on $where" "FAILED: $(tail -n 1 "trace-$recipe-${where%%:*}.log")"
        done
        python3 - "trace-$recipe-cpu.safetensors" "trace-$recipe-cuda.safetensors" "$recipe" <<'PYTHON' | tee -a "$summary"
import array, json, struct, sys
def tensors(path):
    data = open(path, "rb").read()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    read = lambda entry: array.array("f", data[8 + size + entry["data_offsets"][0]:8 + size + entry["data_offsets"][1]])
    return {name: read(entry) for name, entry in header.items() if name != "__metadata__"}
try:
    a, b = tensors(sys.argv[1]), tensors(sys.argv[2])
    worst = {name: max(abs(x - y) for x, y in zip(a[name], b[name])) for name in a}
    largest = max(abs(x) for x in a["logits"])
    print(f"demo {sys.argv[3]:<29} logits differ by {worst['logits']:.2e} at most (largest logit {largest:.1f})")
except Exception as error:
    print(f"demo {sys.argv[3]:<29} FAILED: {error}")
PYTHON
    done
    step generate "$strata" generate demo --prompt "Question: what is" --max-tokens 48 --device "$device"
    "$strata" generate demo --prompt "Question: what is" --max-tokens 48 > generate-cpu.txt 2> /dev/null
    cmp -s generate.txt generate-cpu.txt && note "greedy text" "the same on both" || note "greedy text" "DIFFERS (floats are summed in other orders)"
    step quantize-on-gpu "$strata" quantize demo --recipe phase2 -o "$PWD/variant-gpu" --sequences 4 --length 64 --device "$device"
    step eval-on-gpu "$strata" eval demo "$PWD/variant-gpu" --limit 40 --device "$device"
fi

if wanted sanitizer && command -v compute-sanitizer > /dev/null; then
    # Looking a kernel up tries each compiled file in turn, which memcheck would report as failed calls.
    for tool in memcheck racecheck; do
        quiet=()
        [ "$tool" = memcheck ] && quiet=(--report-api-errors no)
        step "$tool" compute-sanitizer --tool "$tool" "${quiet[@]}" --error-exitcode 9 "$strata" bench --verify --small --device "$device"
        note "$tool findings" "$(grep -hE 'ERROR SUMMARY|RACECHECK SUMMARY' "$tool.txt" "$tool.log" | tail -n 1)"
    done
fi

if wanted operations; then
    step operations "$strata" bench --device "$device" --json
fi

if wanted speed; then
    step speed "$strata" bench --device "$device" --shape "${SHAPE:-nemotron-h-8b}"
    cat speed.txt
fi

# GPTQ and calibration of the shape, all its blocks unless BLOCKS says otherwise. Needs room for the checkpoint in $TMPDIR.
if wanted quantize; then
    LIMIT=${QUANTIZE_LIMIT:-1800} step quantize "$strata" bench --device "$device" --quantize --shape "${SHAPE:-nemotron-h-8b}" ${BLOCKS:+--blocks "$BLOCKS"} \
        --sequences "${SEQUENCES:-128}" --length "${LENGTH:-2048}"
    cat quantize.txt
fi

echo
echo "== summary =="
cat "$summary"
