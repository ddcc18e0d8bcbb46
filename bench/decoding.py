"""Decoding JPEGs of ImageNet's usual 500×375 pixels once into the mapped array, with one process and with several; then random batches from the array against decoding them.

    python bench/decoding.py [--images 1024] [--batch 64] [--size 256] [--workers 2] [--rounds 3]
"""
import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddkit.decoding import decoded
from ddkit.folders import scan_split
from ddkit.images import read_image

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--images", type=int, default=1024)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--size", type=int, default=256)
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--rounds", type=int, default=3)
options = parser.parse_args()
torch.set_num_threads(1)


def write_images(split, count):
    """Coloured noise, smooth on several scales, so that a file has about a photograph's 110 kB."""
    draw = np.random.default_rng(0)
    kinds = []
    for _ in range(16):
        layers = [Image.fromarray(draw.integers(0, 256, (375 // k + 1, 500 // k + 1, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC) for k in (64, 16, 4)]
        kinds.append(Image.fromarray(np.mean([np.asarray(layer, dtype=np.float32) for layer in layers], 0).astype(np.uint8)))
    for folder in ("a", "b"): (split / folder).mkdir(parents=True)
    for i in range(count): kinds[i % 16].save(split / "ab"[i % 2] / f"{i}.JPEG", quality=96)


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


with tempfile.TemporaryDirectory() as folder:
    write_images(Path(folder) / "train", options.images)
    listing = scan_split(Path(folder) / "train")
    kilobytes = sum(Path(path).stat().st_size for path in listing.paths) / len(listing) / 1000
    caches = iter(Path(folder) / f"cache{i}" for i in range(2 * options.rounds + 2))

    def decode(workers): return seconds(lambda: decoded(listing, options.size, cache=next(caches), workers=workers))

    decode(options.workers)  # the processes are started here and stay
    rounds = [(decode(1), decode(options.workers)) for _ in range(options.rounds)]
    one, several = (statistics.median(pair[i] for pair in rounds) for i in (0, 1))

    images = decoded(listing, options.size, cache=next(caches), workers=options.workers)
    batches = [random.Random(i).sample(range(len(listing)), options.batch) for i in range(8)]

    def direct(batch): return torch.stack([read_image(listing.paths[i], options.size) for i in batch])

    def median(work): return 1000 * statistics.median(seconds(lambda: work(batch)) for batch in batches)

    decoding, mapped, floats = median(direct), median(lambda batch: images.pixels[batch]), median(images.batch)
    assert torch.equal(images.pixels[batches[0]], direct(batches[0]))

print(f"{options.images:,} JPEGs of 500 × 375 pixels, {kilobytes:.0f} kB each, to {options.size}²; median of {options.rounds} rounds")
print(f"  decoded by 1 process      {options.images / one:8.0f} images/s")
print(f"  decoded by {options.workers} processes    {options.images / several:8.0f} images/s   {statistics.median(a / b for a, b in rounds):.2f} × faster")
print(f"random batches of {options.batch}, median of {len(batches)}; the array is in the page cache, as it is on a machine with memory to spare")
print(f"  decoded from JPEG          {decoding:7.1f} ms")
print(f"  read from the mapped array {mapped:7.1f} ms         {decoding / mapped:.0f} × faster")
print(f"  the same, as floats        {floats:7.1f} ms")
