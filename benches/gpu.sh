#!/usr/bin/env bash
# What a machine with an NVIDIA GPU has to say, in one call of about ten minutes: correctness first, then speed, then what time is
# left for. Needs the release binary and python3: no cargo, no network, no files.
#   benches/gpu.sh [path/to/strata] [folder for results]
# Every part has a limit of its own, ends early when the whole is over (BUDGET seconds), and leaves JSON or text and a log behind, so
# that a slow part loses nothing but itself. Parts can be chosen: STEPS="doctor small speed" benches/gpu.sh
# Without a GPU: DEVICE=emulated STEPS="doctor small models published" benches/gpu.sh
set -uo pipefail
strata=$(realpath "${1:-target/release/strata}")
results=${2:-gpu-results}
steps=${STEPS:-doctor small models speed quantize operations sanitizer published}
device=${DEVICE:-cuda:0}
shape=${SHAPE:-nemotron-h-8b}
budget=${BUDGET:-600}
mkdir -p "$results"
cd "$results" || exit 2
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$PWD/cache} XDG_DATA_HOME=${XDG_DATA_HOME:-$PWD/data}
summary=$PWD/summary.txt
: > "$summary"
SECONDS=0

wanted() { [[ " $steps " == *" $1 "* ]]; }

note() { printf '%-26s %s\n' "$1" "$2" | tee -a "$summary"; }

# step NAME LIMIT COMMAND...: output to NAME.json (or .txt), log to NAME.log; notes how long it took and whether it ended well.
step() {
    local name=$1 limit=$2 start=$SECONDS left=$((budget - SECONDS)) output=$1.txt status
    shift 2
    if [ "$left" -lt 5 ]; then
        note "$name" "left out: $budget s are over"
        return 1
    fi
    [[ " $* " == *" --json "* ]] && output=$name.json
    timeout -k 5 "$((limit < left ? limit : left))" "$@" > "$output" 2> "$name.log"
    status=$?
    case $status in
        0) note "$name" "ok, $((SECONDS - start)) s" ;;
        124 | 137) note "$name" "CUT OFF after $((SECONDS - start)) s: $(tail -n 1 "$name.log")" ;;
        *) note "$name" "FAILED ($status), $((SECONDS - start)) s: $(tail -n 1 "$name.log")" ;;
    esac
    return "$status"
}

# Prints what is in the JSON or safetensors files of a part; nothing where there are none.
report() { python3 -c "$reports" "$@" 2> /dev/null | tee -a "$summary"; }
reports='
import array, json, struct, sys

def verify(path):
    checks = json.load(open(path))["checks"]
    failed = [check for check in checks if not check["passes"]]
    print(f"  {len(checks) - len(failed)} of {len(checks)} checks pass")
    for check in failed[:40]:
        print("  FAIL", check["kernel"], check["shape"], check["error"], "of", check["tolerance"])

def operations(path):
    found = json.load(open(path))
    print(f"  {found['"'device'"']}, copies {found['"'copy_bytes_per_s'"'] / 1e9:.0f} GB/s")
    for one in found["operations"]:
        print("  {operation:<34} {tokens:>6} tokens {us:>9.1f} us {gb_per_s:>7.0f} GB/s {tera_per_s:>7.1f} Top/s {share:>5.0%} of copy"
              .format(share=one["of_bandwidth"], **one))

def speed(*paths):
    for path in paths:
        for model in json.load(open(path))["models"]:
            print("  {shape} {format}".format(**model), model["recipe"] or "")
            for one in model["prefill"]:
                print("    first token after {tokens:>5} {ms:>9.2f} ms".format(**one))
            for one in model["decode"]:
                print("    step at batch {batch:>3} {ms:>9.3f} ms, {share:.0%} of the bound".format(share=one["of_bound"], **one))

def quantize(path):
    found = json.load(open(path))["quantize"]
    print("  {recipe}: {blocks} of {of_blocks} blocks, {sequences} x {length} tokens, {seconds:.1f} s".format(**found))
    for stage, seconds in found["stages"]:
        print(f"  {stage:<12} {seconds:8.1f} s")
    for kind, (seconds, count) in found["kinds"].items():
        print(f"  {kind:<12} {seconds:8.1f} s a block, {count} in the shape")

def tensors(path):
    data = open(path, "rb").read()
    size = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8:8 + size]).items()
    span = lambda entry: slice(*(8 + size + at for at in entry["data_offsets"]))
    return {name: array.array("f", data[span(entry)]) for name, entry in entries if name != "__metadata__"}

def logits(recipe, a, b):
    a, b = tensors(a)["logits"], tensors(b)["logits"]
    worst = max(abs(x - y) for x, y in zip(a, b))
    print(f"  {recipe:<10} logits differ by {worst:.2e} at most (largest logit {max(map(abs, a)):.1f})")

globals()[sys.argv[1]](*sys.argv[2:])
'

if wanted doctor; then
    command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$summary"
    step doctor 60 "$strata" doctor
fi

# Every kernel on small shapes; the first run compiles them.
if wanted small; then
    step small 150 "$strata" bench --verify --small --device "$device" --json
    report verify small.json
fi

# The demo model in every format on both devices, and the largest difference of a logit.
if wanted models; then
    echo '{"input_ids": [[1, 17, 200, 33, 404, 5, 61, 78, 90, 111, 12, 340, 56, 7, 88, 9, 10, 211, 12, 313, 14, 15, 160, 170]]}' > ids.json
    for recipe in base rtn-w8a8 rtn-w4a8 phase1 phase2 phase3; do
        model=demo
        if [ "$recipe" != base ]; then
            model=$PWD/variant-$recipe
            [ -d "$model" ] || step "variant-$recipe" 60 "$strata" quantize demo --recipe "$recipe" -o "$model" --sequences 4 --length 64 || continue
        fi
        step "trace-$recipe-cpu" 30 "$strata" trace "$model" --ids ids.json -o "$recipe-cpu.safetensors"
        step "trace-$recipe-device" 60 "$strata" trace "$model" --ids ids.json -o "$recipe-device.safetensors" --device "$device"
        report logits "$recipe" "$recipe-cpu.safetensors" "$recipe-device.safetensors"
    done
    step quantize-demo 90 "$strata" quantize demo --recipe phase2 -o "$PWD/variant-device" --force --sequences 4 --length 64 --device "$device"
    step eval-demo 90 "$strata" eval demo "$PWD/variant-device" --limit 20 --device "$device"
fi

# Models of the shape with random weights, a call a format; the last two with what the recipes' models compute besides.
if wanted speed; then
    for model in w16a16 w8a8 w4a8 w8a8:phase1 w4a8:phase2; do
        recipe=()
        [ "${model#*:}" = "$model" ] || recipe=(--recipe "${model#*:}")
        step "speed-${model/:/-}" 75 "$strata" bench --device "$device" --shape "$shape" --formats "${model%:*}" "${recipe[@]}" --json
        report speed "speed-${model/:/-}.json"
    done
fi

# Phase 2 of the first blocks of the shape, and what each of their stages takes. Needs room for the checkpoint in $TMPDIR, or in memory. The
# whole 8B shape, six minutes on an H200: STEPS=quantize BLOCKS=52 QUANTIZE_LIMIT=600 BUDGET=600 benches/gpu.sh
if wanted quantize; then
    if [ -z "${TMPDIR:-}" ] && [ "$(df --output=avail -k /dev/shm 2> /dev/null | tail -n 1)" -gt 40000000 ] 2> /dev/null; then
        export TMPDIR=/dev/shm
    fi
    step quantize "${QUANTIZE_LIMIT:-150}" "$strata" bench --device "$device" --quantize --shape "$shape" --blocks "${BLOCKS:-3}" \
        --sequences "${SEQUENCES:-128}" --length "${LENGTH:-2048}" --json
    report quantize quantize.json
    grep -h '^block [0-9]*:' quantize.log | tee -a "$summary"
fi

# Every operation of the shape, and its share of the bandwidth of a copy in the same run.
if wanted operations; then
    step operations 75 "$strata" bench --device "$device" --json
    report operations operations.json
fi

if wanted sanitizer && command -v compute-sanitizer > /dev/null; then
    # Looking a kernel up tries each compiled file in turn, which memcheck would report as failed calls.
    for tool in memcheck racecheck; do
        quiet=()
        [ "$tool" = memcheck ] && quiet=(--report-api-errors no)
        step "$tool" 120 compute-sanitizer --tool "$tool" "${quiet[@]}" --error-exitcode 9 "$strata" bench --verify --small --device "$device"
        note "$tool findings" "$(grep -hE 'ERROR SUMMARY|RACECHECK SUMMARY' "$tool.txt" "$tool.log" | tail -n 1)"
    done
fi

# Every kernel on the published shapes, in parts that go at once: what takes the time are references on the processor. That they share the GPU
# disturbs its timing, which has shown a race that no run alone did.
if wanted published; then
    parts=${PARTS:-12}
    for ((part = 1; part <= parts; ++part)); do
        step "published-$part" 200 "$strata" bench --verify --part "$part/$parts" --device "$device" --json &
    done
    wait
    for ((part = 1; part <= parts; ++part)); do report verify "published-$part.json"; done
fi

echo
echo "== summary, $SECONDS s =="
cat "$summary"
! grep -qE 'FAIL|CUT OFF|left out' "$summary"
