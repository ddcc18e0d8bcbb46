"""All images in batches against one image at a time (as the released code samples), with the embedded generator and ManifoldGD's guidance.

The same images come out; that is printed too.
    python bench/batched_sampling.py [--ipc 2] [--rounds 3] [--threads 2]
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
parser.add_argument("--ipc", type=int, default=2)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--threads", type=int, default=2)
options = parser.parse_args()
torch.set_num_threads(options.threads)

profile = load_profile("digits", device="cpu")
backbone = load_backbone(profile)
shop = workshop_for("manifoldgd-released", profile, options.ipc, data=load_data(profile), backbone=backbone)
guidance, labels = plan_of(shop, "manifoldgd-released").guidance, shop.labels


def run(batch_size):
    start = time.perf_counter()
    latents = sample_all(backbone, backbone.model_labels(labels), shape=backbone.latent_shape, steps=profile.steps, cfg_scale=profile.cfg_scale,
                         cfg_channels=profile.cfg_channels, guidance=guidance, batch_size=batch_size)
    return time.perf_counter() - start, latents


run(len(labels))  # warm up
rounds = [(run(len(labels)), run(1)) for _ in range(options.rounds)]
together, alone = (statistics.median(pair[i][0] for pair in rounds) for i in (0, 1))
ratio = statistics.median(one[0] / all_[0] for all_, one in rounds)
difference = max((all_[1] - one[1]).abs().max().item() for all_, one in rounds)

print(f"sampling {len(labels)} digits with ManifoldGD, {profile.steps} steps, {torch.get_num_threads()} threads, median of {options.rounds} rounds")
print(f"  one at a time       {alone:8.2f} s")
print(f"  all in one batch    {together:8.2f} s   {ratio:.1f} × faster")
print(f"  largest difference of a latent {difference:.1e} (latents have a deviation of {rounds[0][0][1].std():.2f})")
