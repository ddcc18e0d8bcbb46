"""What a method costs: time and peak memory of making one distilled set, over plain sampling.

Each method runs in a process of its own, on one thread, with what it needs prepared beforehand (latents, fine-tuned weights, networks: from the store).
Memory is the peak of the process's resident memory above what it held before (on a GPU: of the memory allocated there). Linux, because the peak is reset through /proc.
    python bench/methods.py [--profile digits] [--ipc 10] [--rounds 3] [method ...]
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path


def resident(field):
    "A line of /proc/self/status in MiB: VmRSS, what the process holds now, or VmHWM, the most since the last reset."
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)) / 1024


def measure(method, profile, ipc):
    "Make one set; print seconds and MiB as JSON."
    import gc
    import tempfile
    import time

    import torch

    from ddkit.cells import kind_of
    from ddkit.methods import get_method, maker_of, resolved_recipes, set_manifest
    from ddkit.plugins import plugins_of
    from ddkit.profiles import load_profile, torch_device
    from ddkit.sets import save_distilled
    from ddkit.store import Store, one_thread
    from ddkit.work import distill_cell, set_workshop

    chosen, store = load_profile(profile), Store()
    warm, cell = distill_cell(chosen, "dit", 1, 1), distill_cell(chosen, method, ipc, 0)
    cuda = torch_device(chosen).type == "cuda"
    with plugins_of(chosen), one_thread(chosen), tempfile.TemporaryDirectory() as folder:
        kind_of(warm).compute(warm, store.session, Path(folder) / "warm")  # libraries loaded, data and generator in memory
        recipes, workshop = resolved_recipes(get_method(method), chosen), set_workshop(cell, store.session)
        gc.collect()
        if cuda: torch.cuda.reset_peak_memory_stats()
        else: Path("/proc/self/clear_refs").write_text("5")
        before = torch.cuda.memory_allocated() / 2**20 if cuda else resident("VmRSS")
        start = time.perf_counter()
        make_pixels = maker_of(get_method(method))
        pixels = make_pixels(recipes, workshop)
        save_distilled(pixels, workshop.labels, Path(folder) / "set", set_manifest(make_pixels, recipes, workshop))
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident("VmHWM")
    print(json.dumps({"seconds": seconds, "memory": peak - before}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help="default: all")
    parser.add_argument("--profile", default="digits")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.methods[0], options.profile, options.ipc)
        sys.exit()

    from ddkit.methods import method_names

    names = ["dit", *(m for m in options.methods or method_names() if m != "dit")]
    call = [sys.executable, __file__, "--profile", options.profile, "--ipc", str(options.ipc), "--one"]
    costs = {name: [] for name in names}
    for _ in range(options.rounds):  # the methods take turns, so that a busy machine slows all alike
        for name in names: costs[name].append(json.loads(subprocess.run([*call, name], check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
    middle = {name: {what: statistics.median(cost[what] for cost in of) for what in ("seconds", "memory")} for name, of in costs.items()}
    print(f"one distilled set, profile {options.profile}, {options.ipc} images per class, one thread, median of {options.rounds}; peak memory above the loaded generator")
    for name, cost in middle.items():
        print(f"  {name:22}{cost['seconds']:8.2f} s {cost['seconds'] / middle['dit']['seconds']:7.2f} × DiT {cost['memory']:9.0f} MiB {cost['memory'] / middle['dit']['memory']:7.2f} ×")
