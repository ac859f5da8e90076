#!/usr/bin/env python3
"""Rows a second of strata beside lm-evaluation-harness with transformers, on the demo model's rows or those of a folder.

    pip install torch transformers accelerate lm_eval
    cargo build --release
    python3 benches/harness.py                                   # the demo's 1,824 rows
    python3 benches/harness.py --data DIR --tasks arc_easy,piqa  # public rows as JSON lines, one file a task

Every round runs strata in f32, the harness in f32 and strata in W8A8, one after another, so that a machine that others
use slows all of them alike; ratios are those of the medians. The harness is timed from its loaded model to its results,
strata from the start of its process to its end. Processor time is printed beside wall time, since only it means
something on a busy machine.
"""
import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TASKS = ["arc_easy", "arc_challenge", "piqa", "winogrande", "hellaswag"]
SPLITS = {"arc_easy": "test", "arc_challenge": "test", "piqa": "validation", "winogrande": "validation", "hellaswag": "validation"}


def harness(model, tasks, data, threads, batch):
    """In a process of its own: times one evaluation and prints it as JSON."""
    import lm_eval
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    torch.set_num_threads(threads)
    folder = Path(tempfile.mkdtemp())
    library = Path(lm_eval.__file__).parent / "tasks"
    sources = {"arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge", "piqa": "piqa/piqa", "winogrande": "winogrande/default",
               "hellaswag": "hellaswag/hellaswag"}
    for task in tasks:
        # The harness's own definition with local rows in place of the hub's.
        definition = (library / f"{sources[task]}.yaml").read_text()
        lines = [line for line in definition.splitlines() if not line.startswith(("dataset_", "task:", "training_split", "validation_split",
                                                                                  "test_split"))]
        rows = str((Path(data) / f"{task}.jsonl").resolve())
        split = "test_split" if SPLITS[task] == "test" else "validation_split"
        local = ["task: local_" + task, "dataset_path: json", f"dataset_kwargs:\n  data_files:\n    {SPLITS[task]}: {rows}", f"{split}: {SPLITS[task]}"]
        (folder / f"{task}.yaml").write_text("\n".join(local + lines) + "\n")
        for helper in (library / sources[task]).parent.glob("*.py"):
            shutil.copy(helper, folder)
    lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=batch, trust_remote_code=False)
    manager = TaskManager(include_path=str(folder))
    start, busy = time.perf_counter(), time.process_time()
    found = lm_eval.simple_evaluate(model=lm, tasks=["local_" + task for task in tasks], task_manager=manager, bootstrap_iters=0)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    shutil.rmtree(folder)
    rows = sum(counts["effective"] for counts in found["n-samples"].values())
    acc = {name.removeprefix("local_"): metrics["acc,none"] for name, metrics in found["results"].items()}
    print(json.dumps({"seconds": seconds, "cpu": busy, "rows": rows, "acc": acc, "torch": torch.__version__, "transformers": transformers.__version__}))


def strata(binary, model, tasks, data, threads, home):
    command = [binary, "eval", model, "--tasks", ",".join(tasks), "--data", data, "--windows", "0", "--no-speed", "--fresh", "--json",
               "--threads", str(threads)]
    environment = dict(os.environ, XDG_DATA_HOME=home, XDG_CACHE_HOME=home)
    def children():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start, busy = time.perf_counter(), children()
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds, busy = time.perf_counter() - start, children() - busy
    if run.returncode != 0:
        sys.exit(run.stderr)
    tasks = json.loads(run.stdout)["results"][0]["tasks"]
    rows = sum(task["rows"] for task in tasks.values())
    return {"seconds": seconds, "cpu": busy, "rows": rows, "acc": {name: task["acc"] for name, task in tasks.items()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(ROOT / "target/release/strata"))
    parser.add_argument("--data", default=str(ROOT / "models/demo/tasks"), help="folder with a JSON-lines file a task")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="rows that the harness runs at once")
    parser.add_argument("--harness-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    tasks = options.tasks.split(",")
    model = str(ROOT / "models/demo")
    if options.harness_only:
        return harness(model, tasks, options.data, options.threads, options.batch)

    home = tempfile.mkdtemp()
    variant = str(Path(home) / "w8a8")
    environment = dict(os.environ, XDG_DATA_HOME=home, XDG_CACHE_HOME=home)
    subprocess.run([options.binary, "quantize", "demo", "--recipe", "phase1", "-o", variant], env=environment, check=True, capture_output=True)
    other = [sys.executable, __file__, "--harness-only", "--data", options.data, "--tasks", options.tasks, "--threads", str(options.threads),
             "--batch", str(options.batch)]
    limited = dict(os.environ, OMP_NUM_THREADS=str(options.threads), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
                   HF_DATASETS_CACHE=str(Path(home) / "datasets"), TOKENIZERS_PARALLELISM="false")
    times = {"strata f32": [], "lm-evaluation-harness f32": [], "strata W8A8": []}
    for turn in range(options.rounds):
        runs = {
            "strata f32": strata(options.binary, "demo", tasks, options.data, options.threads, home),
            "lm-evaluation-harness f32": None,
            "strata W8A8": None,
        }
        run = subprocess.run(other, env=limited, capture_output=True, text=True)
        if run.returncode != 0:
            sys.exit(run.stderr)
        runs["lm-evaluation-harness f32"] = json.loads(run.stdout.strip().splitlines()[-1])
        runs["strata W8A8"] = strata(options.binary, variant, tasks, options.data, options.threads, home)
        for name, run in runs.items():
            times[name].append((run["seconds"], run["cpu"]))
        own, theirs = runs["strata f32"], runs["lm-evaluation-harness f32"]
        if own["rows"] != theirs["rows"] or any(abs(own["acc"][task] - theirs["acc"][task]) > 0.002 for task in tasks):
            sys.exit(f"the two do not agree: {own}, {theirs}")
        print(f"round {turn + 1}: " + ", ".join(f"{name} {run['seconds']:.1f} s ({run['cpu']:.1f} s cpu)" for name, run in runs.items()), file=sys.stderr, flush=True)
    rows = own["rows"]
    print(f"{rows} rows of {options.tasks}, {options.threads} threads, {options.rounds} rounds, load {os.getloadavg()[0]:.1f}; "
          f"torch {theirs['torch']}, transformers {theirs['transformers']}")
    medians = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in times.items()}
    base, base_cpu = medians["lm-evaluation-harness f32"]
    for name, (median, cpu) in medians.items():
        spread = f"{min(times[name])[0]:.1f} to {max(times[name])[0]:.1f}"
        print(f"{name:<27} {median:7.1f} s ({spread}), cpu {cpu:6.1f} s  {rows / median:6.0f} rows/s  "
              f"{base / median:5.2f} x the harness, by cpu {base_cpu / cpu:5.2f} x")
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
