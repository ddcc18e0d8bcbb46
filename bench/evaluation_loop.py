"""What an evaluation costs: the kit's loop (bytes on the device, batched augmentations) against a plain loop (PIL transforms in DataLoader workers).

Both train the same network for the same number of steps with the same augmentations, and test it equally often. The plain loop is written as released
trainers are: one PIL image at a time, resized, cropped, flipped and jittered in worker processes, test images resized again at every test, loss and accuracy
fetched after every step. Its images are decoded and in memory, and its workers have started, before the clock starts. "network" is the training steps alone,
on a batch that is ready: what no loop can save.
    python bench/evaluation_loop.py [--rounds 3] [--threads 1] [--workers 2]
"""
import argparse
import math
import random
import resource
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader, Dataset

from ddkit.augmentations import COLOR_AXES, COLOR_VALUES, NORMALIZATIONS, cutmix_box
from ddkit.data import load_data
from ddkit.images import ImageSet
from ddkit.networks import create_network
from ddkit.profiles import load_profile, torch_device
from ddkit.protocols import training_values
from ddkit.training import count_hits, make_resident, train_networks


# --- the plain loop -----------------------------------------------------------------------------------------------------------------------------------
def random_resized_crop(image, size):
    width, height = image.size
    for _ in range(10):
        area, aspect = width * height * random.uniform(0.5, 1), math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)
    return image.resize((size, size), Image.Resampling.BILINEAR)


def color_jitter(image):
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    random.shuffle(enhancers)
    for enhancer in enhancers: image = enhancer(image).enhance(random.uniform(0.6, 1.4))
    return image


def resize(image, size):
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


class PILImages(Dataset):
    "Images in memory as PIL has them; every access transforms one."
    def __init__(self, images: ImageSet, profile, train: bool):
        arrays = [pixels.permute(1, 2, 0).numpy() for pixels in images.pixels]
        self.images = [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]
        self.labels, self.profile, self.train = images.labels.tolist(), profile, train

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, p = resize(self.images[index], self.profile.eval_size), self.profile
        steps = p.augmentations if self.train else ()
        if "crop" in steps: image = random_resized_crop(image, p.eval_size)
        if "flip" in steps and random.random() < 0.5: image = ImageOps.mirror(image)
        if "color" in steps: image = color_jitter(image)
        array = np.atleast_3d(np.asarray(image, dtype=np.float32) / 255)
        if "lighting" in steps: array = array + np.array(COLOR_AXES) @ (np.random.normal(0, 0.1, 3) * COLOR_VALUES)
        mean, std = NORMALIZATIONS[p.normalization]()
        array = (array - np.array(mean)) / np.array(std)
        return torch.from_numpy(array.transpose(2, 0, 1).astype(np.float32)), self.labels[index]


def plain_loop(network, train, test, profile, epochs, tests, workers):
    "Yields once everything has started, then once more at the end."
    device = next(network.parameters()).device
    options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=device.type == "cuda")
    loader = DataLoader(PILImages(train, profile, True), profile.eval_batch_size, shuffle=True, **options)
    test_loader = DataLoader(PILImages(test, profile, False), profile.eval_batch_size // 2, **options)
    optimizer = torch.optim.SGD(network.parameters(), profile.learning_rate, momentum=0.9, weight_decay=profile.weight_decay)
    draws = torch.Generator().manual_seed(0)
    next(iter(loader)), next(iter(test_loader))  # workers start here
    yield
    for epoch in range(1, epochs + 1):
        network.train()
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            if "cutmix" in profile.augmentations:
                top, bottom, left, right = cutmix_box(profile.eval_size, draws)
                partners = torch.randperm(len(labels))
                images[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
                share = 1 - (bottom - top) * (right - left) / profile.eval_size**2
                logits = network(images)
                loss = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels[partners])
            else:
                logits = network(images)
                loss = F.cross_entropy(logits, labels)
            loss.item(), (logits.argmax(1) == labels).float().mean().item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % (epochs // tests): continue
        network.eval()
        with torch.no_grad():
            for images, labels in test_loader: (network(images.to(device)).argmax(1) == labels.to(device)).sum().item()
    yield


# --- the kit's loop, and the network alone ------------------------------------------------------------------------------------------------------------
def kit_loop(network, train, test, profile, epochs, tests, workers):
    device = next(network.parameters()).device
    yield
    train, test = (make_resident(images, "the set", profile, 10, device, "whole") for images in (train, test))
    training, hits = training_values(profile.replace(epochs=epochs), "hard", train.ipc, 10), []
    for epoch in train_networks([network], [train], training, profile, [0]):
        if epoch.number % (epochs // tests) == 0: hits.append(count_hits(network, test, profile, 10))
    torch.stack(hits).cpu()
    yield


def network_alone(network, train, test, profile, epochs, tests, workers):
    device, batch = next(network.parameters()).device, profile.eval_batch_size
    images = torch.randn(len(train), profile.channels, profile.eval_size, profile.eval_size, device=device)
    labels = train.labels.to(device)
    optimizer = torch.optim.SGD(network.parameters(), profile.learning_rate, momentum=0.9, fused=True)
    yield
    for _ in range(epochs):
        for x, y in zip(images.split(batch), labels.split(batch)):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    if device.type == "cuda": torch.cuda.synchronize()
    yield


def processor_time():
    "Seconds of this process and of the workers that have ended."
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + workers.ru_utime + workers.ru_stime


def seconds(loop, name, profile, *arguments):
    "Elapsed and processor time of one run."
    with torch.random.fork_rng(devices=[]):
        network = create_network(name, 10, profile.eval_size, profile.channels, profile.network_width).to(torch_device(profile))
    run = loop(network, *arguments[:2], profile, *arguments[2:])
    next(run)
    start, busy = time.perf_counter(), processor_time()
    next(run)
    elapsed = time.perf_counter() - start
    run.close()  # ends the workers
    return elapsed, processor_time() - busy


def compare(title, name, profile, train, test, epochs, tests):
    loops = {"network": network_alone, "kit": kit_loop, "plain": plain_loop}
    rounds = [{key: seconds(loop, name, profile, train, test, epochs, tests, options.workers) for key, loop in loops.items()} for _ in range(options.rounds)]
    steps = epochs * math.ceil(len(train) / profile.eval_batch_size)
    print(f"{title}: {name}, width {profile.network_width:g}, {' + '.join(profile.augmentations)}, {steps} steps, {tests} tests of {len(test)} images")
    for key in loops:
        elapsed, busy = (statistics.median(r[key][i] for r in rounds) for i in (0, 1))
        ratio, busy_ratio = (statistics.median(r[key][i] / r["kit"][i] for r in rounds) for i in (0, 1))
        print(f"  {key:10}{elapsed:7.2f} s  {ratio:5.2f} × kit    processor time {busy:7.2f} s  {busy_ratio:5.2f} ×", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"evaluation loop, {options.threads} thread(s) for the network, {options.workers} DataLoader workers for the plain loop, median of {options.rounds} rounds")

    digits = load_profile("digits", network_width=1 / 8)
    data = load_data(digits)
    few = torch.cat([data.train.of_class(c)[:10] for c in range(10)])
    train = ImageSet(data.train.pixels[few], data.train.labels[few])
    for name in ("convnet6", "resnet18"): compare("digits, 16 px", name, digits, train, data.test, epochs=20, tests=4)

    papers = load_profile("imagewoof")
    if torch_device(papers).type == "cpu": papers = papers.replace(network_width=1 / 8)  # so that the CPU's network doesn't hide the loop
    draws = torch.Generator().manual_seed(0)
    blurred = F.interpolate(torch.rand(192, 3, 24, 24, generator=draws), size=(256, 256), mode="bicubic").clamp(0, 1)
    generated = ImageSet((blurred * 255).byte(), torch.arange(192) % 10)
    train, test = ImageSet(generated.pixels[:128], generated.labels[:128]), ImageSet(generated.pixels[128:], generated.labels[128:])
    compare("generated images, 224 px", "resnet18", papers, train, test, epochs=2, tests=2)
