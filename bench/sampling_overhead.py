"""What guidance costs: the time to sample 100 digits with the embedded generator, unguided, with MGD³ and with both ManifoldGD variants.

The four take turns, so that a busy machine slows all alike; medians over the rounds, ratios within each round.
    python bench/sampling_overhead.py [--ipc 10] [--rounds 3] [--threads 2]
"""
import argparse
import statistics
import time

import torch

from ddkit.backbones import load_backbone
from ddkit.data import load_data
from ddkit.methods import workshop_for
from ddkit.profiles import load_profile
from ddkit.recipes import plan_of
from ddkit.sampling import sample_all

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--ipc", type=int, default=10)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--threads", type=int, default=2)
options = parser.parse_args()
torch.set_num_threads(options.threads)

profile = load_profile("digits", device="cpu")
backbone, data = load_backbone(profile), load_data(profile)
latents = backbone.encode(data.train.images)
methods = {"unguided": "dit", "MGD³": "mgd3", "ManifoldGD (released)": "manifoldgd-released", "ManifoldGD (paper)": "manifoldgd"}
shops = {name: workshop_for(method, profile, options.ipc, data=data, latents=latents, backbone=backbone) for name, method in methods.items()}
guidances = {name: plan_of(shops[name], method).guidance for name, method in methods.items()}
labels = shops["unguided"].labels


def seconds(guidance):
    "Elapsed and processor time of one run."
    start, busy = time.perf_counter(), time.process_time()
    sample_all(backbone, backbone.model_labels(labels), shape=backbone.latent_shape, sampler=profile.sampler, steps=profile.steps,
               cfg_scale=profile.cfg_scale, cfg_channels=profile.cfg_channels, guidance=guidance, batch_size=profile.batch_size)
    return time.perf_counter() - start, time.process_time() - busy


seconds(None)  # warm up
times = [{name: seconds(guidance) for name, guidance in guidances.items()} for _ in range(options.rounds)]
print(f"sampling {len(labels)} digits, {profile.steps} steps, guided until step {guidances['MGD³'].stop}, {torch.get_num_threads()} threads, median of {options.rounds} rounds")
for name in guidances:
    elapsed, busy = (statistics.median(t[name][i] for t in times) for i in (0, 1))
    ratio, busy_ratio = (statistics.median(t[name][i] / t["unguided"][i] for t in times) for i in (0, 1))
    print(f"  {name:22}{elapsed:8.2f} s  {ratio:5.2f} × unguided    processor time {busy:8.2f} s  {busy_ratio:5.2f} ×")
