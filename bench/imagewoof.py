"""What a paper-sized evaluation costs: ImageWoof's classes, images and sizes, on generated images (content does not change the time).

10 classes, 10 images each, 224 pixels, tested about a hundred times on 3,900 images; 2,000 epochs as released for this size. A few epochs and one test pass
are timed after a warm-up, and the total of the released length is extrapolated from them. On a GPU if there is one.
    python bench/imagewoof.py [--epochs N] [--test-images N] [--protocol hard] [--networks convnet6 resnetap10 resnet18] [--seeds 1] [--precision fp32]
"""
import argparse
import math
import statistics
import time

import torch

from ddkit.images import ImageSet
from ddkit.networks import create_network
from ddkit.profiles import load_profile, torch_device
from ddkit.protocols import evaluation_epochs, needs_teacher, training_values
from ddkit.training import count_hits, make_resident, memory_format, student, train_networks

CLASSES = 10
TEST_IMAGES = 3900


def generated(count: int, size: int, seed: int) -> ImageSet:
    "Smooth random images of ten classes."
    draws = torch.Generator().manual_seed(seed)
    pixels = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for start in range(0, count, 64):
        part = torch.rand(min(64, count - start), 3, 14, 14, generator=draws)
        pixels[start:start + 64] = torch.nn.functional.interpolate(part, size=(size, size), mode="bicubic").clamp(0, 1).mul(255).byte()
    return ImageSet(pixels, torch.arange(count) % CLASSES)


def now(device) -> float:
    if device.type == "cuda": torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, profile, options, train: list[ImageSet], test: ImageSet) -> None:
    device = torch_device(profile)
    training = training_values(profile, options.protocol, len(train[0]) // CLASSES, CLASSES)
    sets = [make_resident(images, "the set", profile, CLASSES, device, "whole") for images in train]
    tests = make_resident(test, "the test set", profile, CLASSES, device, training.test_view)
    networks = [student(name, CLASSES, profile, seed, device, training) for seed in range(options.seeds)]
    teacher = None
    if needs_teacher(profile, options.protocol): teacher = create_network(profile.teacher_network, CLASSES, profile.eval_size, norm="batch").to(device).eval().requires_grad_(False)
    epochs, passes, start = [], [], now(device)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        for epoch in train_networks(networks, sets, training, profile, list(range(options.seeds)), teacher):
            epochs.append(now(device) - start)
            if epoch.number in (1, options.epochs):
                start = now(device)
                for network in networks: count_hits(network, tests, profile, CLASSES).sum().item()
                passes.append(now(device) - start)
            if epoch.number >= options.epochs: break
            start = now(device)
    epoch, test_pass = statistics.median(epochs[1:] or epochs), passes[-1] * TEST_IMAGES / options.test_images
    steps = math.ceil(len(train[0]) / training.batch_size)
    count = len(evaluation_epochs(training.epochs, training.evaluations, training.tested))
    total = training.epochs * epoch + count * test_pass
    print(f"  {name:12} epoch {1000 * epoch:10.1f} ms ({steps} steps, {1000 * epoch / steps:.1f} ms each)   test pass {test_pass:8.2f} s   "
          f"{training.epochs} epochs + {count} tests = {total / 60:.1f} min, for each of {options.seeds} seed(s) {total / 60 / options.seeds:.1f} min", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, help="epochs to time, default 2000 on a GPU and 1 without; the total is extrapolated to the protocol's own")
    parser.add_argument("--test-images", type=int, help="test images to time, default 3900 on a GPU and 40 without; a test pass is extrapolated to 3900")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--protocol", default="hard")
    parser.add_argument("--networks", nargs="+", default=["convnet6", "resnetap10", "resnet18"])
    parser.add_argument("--seeds", type=int, default=1, help="seeds trained together")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    profile = load_profile("imagewoof", precision=options.precision)
    device = torch_device(profile)
    options.epochs = options.epochs or (2000 if device.type == "cuda" else 1)
    options.test_images = options.test_images or (TEST_IMAGES if device.type == "cuda" else 40)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {options.threads} thread(s)'}, torch {torch.__version__}, {options.precision}, {memory_format(profile, device)}; "
          f"protocol {options.protocol}, {CLASSES} classes × {options.ipc} images, {profile.eval_size} pixels, {options.test_images} test images, {options.epochs} epochs timed")
    train = [generated(CLASSES * options.ipc, profile.image_size, seed) for seed in range(options.seeds)]
    test = generated(options.test_images, profile.image_size, 1000)
    for name in options.networks: measure(name, profile, options, train, test)
