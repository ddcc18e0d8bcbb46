"""Image folders and the cache of decoded images under fire: kills, two processes, damaged arrays, damaged files, wrong layouts."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddkit import decoding
from ddkit.data import load_data, load_folder_data
from ddkit.decoding import decoded, mapped
from ddkit.folders import archive, class_lists, imagenet_indices, scan_split
from ddkit.images import read_image
from ddkit.profiles import load_profile

WOOF = [c.wnid for c in class_lists()["imagewoof"]]
SIZE = 32

# a process that decodes a split on its own, slowly, and leaves a line for every chunk it decodes
DECODES = """
import sys, time
from ddkit import decoding
from ddkit.folders import scan_split

plain = decoding._decode_chunk
def slow(chunk, *rest):
    time.sleep(float(sys.argv[4]))
    with open(sys.argv[3], "a") as marks: marks.write(f"{chunk}\\n")
    return plain(chunk, *rest)

decoding._decode_chunk = slow
print(len(decoding.decoded(scan_split(sys.argv[1]), 32, 3, sys.argv[2], workers=1)))
"""


def write_images(split, wnids, count):
    draw = np.random.default_rng(1)
    for wnid in wnids:
        (split / wnid).mkdir(parents=True)
        for i in range(count):
            height, width = draw.integers(40, 90, 2)
            Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(split / wnid / f"{wnid}_{i}.JPEG")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """640 images in ten classes: five chunks."""
    split = tmp_path_factory.mktemp("imagenet") / "train"
    write_images(split, WOOF, 64)
    return split


@pytest.fixture
def own_train(train, tmp_path):
    shutil.copytree(train, tmp_path / "train")
    return tmp_path / "train"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def chunks_decoded(monkeypatch):
    """The numbers of the chunks that are decoded in this process."""
    done, plain = [], decoding._decode_chunk
    monkeypatch.setattr(decoding, "_decode_chunk", lambda chunk, *rest: (done.append(chunk), plain(chunk, *rest))[1])
    return done


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def start(split, cache, marks, seconds):
    return subprocess.Popen([sys.executable, "-c", DECODES, split, cache, marks, str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_as_read(images, listing):
    assert len(images) == len(listing) and torch.equal(images.labels, listing.labels)
    for pixels, path in zip(images.pixels, listing.paths):
        assert torch.equal(pixels, read_image(path, SIZE)), path


def only_entry(cache):
    (entry,) = cache.glob("train-*")
    return entry


# ---- the cache ----

def test_mapped_pixels_are_those_of_every_file(train, cache):
    listing = scan_split(train, WOOF)
    assert_as_read(decoded(listing, SIZE, cache=cache, workers=2), listing)
    again = decoded(listing, SIZE, cache=cache)
    assert_as_read(again, listing)
    grey = decoded(listing, SIZE, 1, cache)
    assert grey.pixels.shape == (640, 1, SIZE, SIZE) and torch.equal(grey.pixels[7], read_image(listing.paths[7], SIZE, 1))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_a_mapping_is_for_reading_only_and_so_not_counted_as_memory(tmp_path):
    """A private mapping that may be written is refused above memory and swap, a shared one of a file never."""
    np.save(tmp_path / "latents.npy", np.arange(6, dtype=np.float32).reshape(2, 3))
    tensor = mapped(tmp_path / "latents.npy")
    (line,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(tmp_path / "latents.npy"))]
    assert line.split()[1] == "r--s" and torch.equal(tensor, torch.arange(6.0).view(2, 3))


def test_a_killed_process_loses_only_the_chunks_it_worked_on(train, cache, tmp_path, chunks_decoded):
    marks = tmp_path / "marks"
    victim = start(train, cache, marks, 0.5)
    wait_for(lambda: [c for p in cache.glob("unfinished-*/chunks.txt") for c in p.read_text().splitlines()][1:])
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not list(cache.glob("train-*"))  # nothing that counts as complete
    kept = set(map(int, (next(cache.glob("unfinished-*")) / "chunks.txt").read_text().split()[::2]))
    listing = scan_split(train)
    assert_as_read(decoded(listing, SIZE, cache=cache, workers=1), listing)
    assert set(chunks_decoded) == set(range(5)) - kept and len(kept) >= 2
    assert not list(cache.glob("unfinished-*"))


def test_two_processes_decode_once(train, cache, tmp_path):
    marks = tmp_path / "marks"
    both = [start(train, cache, marks, 0.2) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    assert [out for out, _ in ends] == ["640\n"] * 2, ends
    assert sorted(marks.read_text().split()) == list("01234")
    assert sum("waiting for another process that decodes" in err for _, err in ends) == 1


def test_a_recorded_chunk_counts_only_with_its_bytes(train, cache, chunks_decoded):
    listing = scan_split(train)
    decoded(listing, SIZE, cache=cache)
    entry = only_entry(cache)
    unfinished = entry.rename(entry.with_name("unfinished-" + entry.name))
    (unfinished / "entry.json").unlink()
    lines = (unfinished / "chunks.txt").read_text().splitlines()
    lines = {int(line.split()[0]): line for line in lines}
    (unfinished / "chunks.txt").write_text(f"{lines[0]}\n{lines[1].split()[0]} 12345\n{lines[2]}\n99 7\nnonsense\n{lines[3][:-1]}")  # right, wrong, right, unknown, nonsense, half a line
    chunks_decoded.clear()
    assert_as_read(decoded(listing, SIZE, cache=cache), listing)
    assert sorted(chunks_decoded) == [1, 3, 4]


@pytest.mark.parametrize("damage, again", [("byte", [2]), ("short", [3, 4]), ("header", []), ("no description", []), ("touched", []), ("gone", [0, 1, 2, 3, 4])])
def test_a_damaged_array_is_noticed_and_mended(damage, again, train, cache, chunks_decoded):
    listing = scan_split(train)
    decoded(listing, SIZE, cache=cache)
    array = only_entry(cache) / "pixels.npy"
    whole, time_of = array.read_bytes(), array.stat().st_mtime_ns
    chunk = decoding.CHUNK * 3 * SIZE**2
    with open(array, "r+b") as file:
        if damage == "byte": file.seek(128 + 2 * chunk + 5); file.write(bytes([whole[128 + 2 * chunk + 5] ^ 1]))
        if damage == "short": file.truncate(128 + 4 * chunk - 1)
        if damage == "header": file.write(b"x" * 60)
    if damage == "no description": (array.parent / "entry.json").unlink()
    if damage == "touched": os.utime(array, ns=(0, time_of + 1))
    if damage == "gone": array.unlink()
    chunks_decoded.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert_as_read(decoded(listing, SIZE, cache=cache), listing)
    assert sorted(chunks_decoded) == again
    assert any("is damaged; decoding" in str(w.message) for w in said) == bool(again)
    assert array.read_bytes() == whole
    chunks_decoded.clear()
    decoded(listing, SIZE, cache=cache)
    assert chunks_decoded == []


def test_a_changed_file_is_another_entry_in_the_old_ones_place(own_train, cache, chunks_decoded):
    before = scan_split(own_train)
    first = decoded(before, SIZE, cache=cache)
    copied = first.pixels.clone()
    name = own_train / WOOF[0] / f"{WOOF[0]}_0.JPEG"
    Image.new("RGB", (50, 40), (255, 0, 0)).save(name)
    listing = scan_split(own_train)
    assert_as_read(decoded(listing, SIZE, cache=cache), listing)
    assert only_entry(cache).name != decoding._entry(before, SIZE, 3, cache).folder.name and chunks_decoded.count(0) == 2
    if sys.platform == "linux": assert torch.equal(first.pixels, copied)  # whoever has mapped the old one keeps it
    (own_train / WOOF[0] / ".DS_Store").write_text("hidden")
    assert scan_split(own_train).digest == listing.digest
    assert scan_split(own_train, WOOF[::-1]).labels[0] == 0 and scan_split(own_train, WOOF[::-1]).folders[0] == WOOF[-1]


def test_only_entries_whose_files_have_changed_are_removed(own_train, cache, tmp_path, monkeypatch):
    shutil.copytree(own_train, tmp_path / "elsewhere" / "train")
    kept = [(scan_split(tmp_path / "elsewhere" / "train"), SIZE, 3), (scan_split(own_train, WOOF[::-1]), SIZE, 3), (scan_split(own_train, WOOF[:5]), SIZE, 3), (scan_split(own_train), 8, 3), (scan_split(own_train), SIZE, 1)]
    old = scan_split(own_train)
    for what in [*kept, (old, SIZE, 3)]: decoded(*what, cache=cache)
    entries = [decoding._entry(*what, cache) for what in kept]
    abandoned, foreign = cache / "unfinished-train-32-abc", cache / "notes"
    for folder in (abandoned, foreign): folder.mkdir()
    (abandoned / "entry.json").write_text((decoding._entry(old, SIZE, 3, cache).folder / "entry.json").read_text())
    (foreign / "entry.json").write_text("[]")
    name = own_train / WOOF[0] / f"{WOOF[0]}_0.JPEG"
    os.utime(name, ns=(0, name.stat().st_mtime_ns + 1))
    busy = decoding._entry(old, SIZE, 3, cache)
    monkeypatch.chdir(own_train.parent)
    new = scan_split("train")  # the same folder by another name
    with decoding._lock(busy): decoded(new, SIZE, cache=cache)
    assert busy.folder.exists() and not abandoned.exists()  # somebody works on it
    shutil.rmtree(decoding._entry(new, SIZE, 3, cache).folder)
    decoded(new, SIZE, cache=cache)
    assert {path.name for path in cache.iterdir()} == {entry.folder.name for entry in [*entries, decoding._entry(new, SIZE, 3, cache)]} | {"locks", "notes"}


def test_all_damaged_files_are_named_at_once(own_train, cache):
    listing = scan_split(own_train)
    broken = [Path(listing.paths[i]) for i in (3, 200, 201, 639)]
    for path in broken[:2]: path.write_bytes(path.read_bytes()[:-400])  # truncated
    broken[2].write_text("text")
    broken[3].write_bytes(b"")
    with pytest.raises(ValueError, match="4 unreadable images among 640") as error: decoded(scan_split(own_train), SIZE, cache=cache, workers=2)
    assert all(str(path) in str(error.value) for path in broken) and "\n" not in str(error.value)
    assert "truncated" in str(error.value) and "no known image format" in str(error.value)
    assert not list(cache.glob("train-*"))
    for path in broken: path.unlink()
    assert len(decoded(scan_split(own_train), SIZE, cache=cache, workers=1)) == 636
    assert not list(cache.glob("unfinished-*"))  # of the files as they were


def test_a_full_disk_is_said_before_decoding(train, cache, monkeypatch, chunks_decoded):
    monkeypatch.setattr(decoding.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(ValueError, match=r"needs 0\.0 GB and .* has 0\.0 GB free; set `cache = /path`"): decoded(scan_split(train), SIZE, cache=cache)
    assert chunks_decoded == []


def test_a_cache_that_cannot_be_written_is_named(train, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/cache cannot be written .*set `cache = /path`"): decoded(scan_split(train), SIZE, cache=tmp_path / "file" / "cache")


def test_a_split_larger_than_memory_costs_only_what_is_read(tmp_path):
    """ImageNet-1K at 256 pixels: 1.28 million images, 252 GB, here of holes."""
    code = f"""
import json, sys, resource, torch
from pathlib import Path
from ddkit import decoding
from ddkit.folders import Listing
listing = Listing("/nowhere/train", ["a", "b"], [[str(i) for i in range(640000)]] * 2, "digest")
entry = decoding._entry(listing, 256, 3, Path({str(tmp_path)!r}))
entry.folder.mkdir()
with open(entry.folder / "pixels.npy", "wb") as file: file.write(entry.header); file.truncate(len(entry.header) + len(listing) * entry.image_bytes)
(entry.folder / "entry.json").write_text(json.dumps({{"stamp": decoding._stamp(entry.folder)}}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = decoding.decoded(listing, 256, 3, {str(tmp_path)!r})
batch = images.batch(images.of_class(1)[torch.randint(640000, (64,))])
try: images.images
except ValueError as error: print(error)
print(tuple(batch.shape), images.pixels.numel(), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # torch warns, once per process, of arrays that are not writable
    refusal, result = done.stdout.splitlines()
    assert refusal == "1,280,000 images at once are 1,006.6 GB of floats; read them in parts, with .batch(indices)"
    shape, count, megabytes = re.fullmatch(r"(\(.*\)) (\d+) (\d+)", result).groups()
    assert shape == "(64, 3, 256, 256)" and int(count) == 1280000 * 3 * 256**2 and int(megabytes) < 1000


# ---- files ----

def test_kinds_of_files(tmp_path):
    draw = np.random.default_rng(0)
    photo = Image.fromarray(draw.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((80, 60), Image.Resampling.BICUBIC)

    def read(name, image, channels=3, **how):
        image.save(tmp_path / name, **how)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return read_image(tmp_path / name, SIZE, channels).float()

    plain = read("a.JPEG", photo, quality=95)
    turned = Image.Exif()
    turned[0x0112] = 6
    assert torch.equal(read("b.JPEG", photo, quality=95, exif=turned), plain)
    png = read("png in.JPEG", photo, format="PNG")
    assert (png - plain).abs().mean() < 4
    assert (read("c.JPEG", photo.convert("CMYK"), quality=95) - plain).abs().mean() < 4
    grey = read("d.JPEG", photo.convert("L"), quality=95)
    assert torch.equal(grey[0], grey[2]) and (grey[0] - read("a.JPEG", photo, 1, quality=95)[0]).abs().mean() < 4
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    assert torch.equal(read("e.png", deep)[0], read("f.png", photo.convert("L"), 1)[0])
    clear = photo.convert("RGBA")
    clear.putalpha(Image.fromarray(draw.integers(0, 256, (60, 80), dtype=np.uint8)))
    assert torch.equal(read("g.png", clear), png)
    palette = photo.quantize(32)
    assert torch.equal(read("h.png", palette, transparency=bytes(range(32))), read("i.png", palette.convert("RGB")))


# ---- layouts ----

@pytest.mark.parametrize("validation", ["val", "validation"])
def test_both_names_of_the_second_split(validation, tmp_path, monkeypatch):
    monkeypatch.setenv("DDKIT_RUNS", str(tmp_path / "runs"))
    write_images(tmp_path / "train", WOOF, 30)
    write_images(tmp_path / validation, WOOF, 2)
    real = load_data(load_profile("imagewoof", root=str(tmp_path), image_size=SIZE))
    assert (len(real.train), len(real.test)) == (300, 20) and real.imagenet == tuple(imagenet_indices("imagewoof"))
    assert real.classes[0] == "Australian terrier" and [p.name for p in (tmp_path / "runs").iterdir()] == ["decoded"]
    sorted_ = load_folder_data(tmp_path, SIZE, classes="imagewoof-sorted")
    assert torch.equal(sorted_.train.pixels[:30], real.train.pixels[real.train.of_class(WOOF.index(sorted_.folders[0]))])
    assert load_folder_data(tmp_path, SIZE).folders == sorted_.folders


def linked(root, wnids, train, test, swap=0, size=(50, 40)):
    """`train` and `test` images in all; every `swap`th file of a split has a name of the other."""
    root.mkdir(parents=True)
    pictures = [root / f".{i}.JPEG" for i in range(7)]
    for i, picture in enumerate(pictures): Image.new("RGB", (size[0] + i, size[1])).save(picture) if size[1] in (160, 320) else Image.new("RGB", (size[0] + 3 * i, size[1] + 2 * i)).save(picture)
    for split, count in (("train", train), ("val", test)):
        for wnid in wnids: (root / split / wnid).mkdir(parents=True)
        for i in range(count):
            wnid = wnids[i % len(wnids)]
            as_training = (split == "train") != bool(swap and i % swap == 0)
            os.link(pictures[i // 10 % 7], root / split / wnid / (f"{wnid}_{i}.JPEG" if as_training else f"ILSVRC2012_val_{i:08}.JPEG"))


def test_fastai_and_original_archives_are_told_apart(tmp_path):
    nette = [c.wnid for c in class_lists()["imagenette"]]
    linked(tmp_path / "a", nette, 9469, 3925, swap=23)
    assert archive(tmp_path / "a") == archive(tmp_path / "a", "imagenette") == "fastai imagenette2"
    linked(tmp_path / "b", WOOF, 9025, 3929, swap=23, size=(200, 160))
    assert archive(tmp_path / "b", "imagewoof") == "fastai imagewoof2-160"
    linked(tmp_path / "c", WOOF, 120, 60, swap=23, size=(400, 320))
    assert archive(tmp_path / "c", "imagewoof") == "fastai imagewoof2-320, incomplete"
    linked(tmp_path / "d", nette, 12894, 500)
    assert archive(tmp_path / "d", "imagenette") == "ImageNet-1k"
    linked(tmp_path / "e", nette, 100, 500)
    assert archive(tmp_path / "e", "imagenette") == "ImageNet-1k, incomplete"
    (tmp_path / "e" / "noisy_imagenette.csv").touch()
    assert archive(tmp_path / "e", "imagenette") == "fastai imagenette2, incomplete"
    (tmp_path / "c" / "unsup").mkdir()
    assert archive(tmp_path / "c", "imagewoof") == "fastai imagewang-320"
    linked(tmp_path / "f", ["cats", "dogs"], 100, 20)
    assert archive(tmp_path / "f") == "other"


def test_all_thousand_classes_and_no_others(tmp_path, cache):
    wnids = [c.wnid for c in class_lists()["imagenet1k"]]
    linked(tmp_path / "all", wnids, 1000, 1000)
    real = load_folder_data(tmp_path / "all", 8, classes="imagenet1k", cache=cache)
    assert real.imagenet == tuple(range(1000)) == tuple(imagenet_indices("imagenet1k")) and real.folders == wnids
    assert len(set(real.classes)) == 1000 and real.classes[0] == "tench" and real.archive == "ImageNet-1k, incomplete"
    (tmp_path / "all" / "val" / "n99999999").mkdir()
    with pytest.raises(ValueError, match="1 folder besides its 1,000 classes: n99999999"): load_folder_data(tmp_path / "all", 8, classes="imagenet1k", cache=cache)
    shutil.rmtree(tmp_path / "all" / "train" / wnids[500])
    with pytest.raises(FileNotFoundError, match=f"train lacks 1 of its 1,000 class folders: {wnids[500]}"): load_folder_data(tmp_path / "all", 8, classes="imagenet1k", cache=cache)


def test_wrong_layouts_are_named(tmp_path):
    root = tmp_path / "imagenet"
    linked(root, WOOF, 100, 20)
    load = lambda where=root, classes="imagewoof": load_folder_data(where, SIZE, classes=classes)

    def says(kind, pattern, **how):
        with pytest.raises(kind, match=pattern) as error: load(**how)
        assert "\n" not in str(error.value)

    says(FileNotFoundError, rf"did you mean '{root}'", where=tmp_path)
    says(FileNotFoundError, "lacks 10 of its 10 class folders: n01440764", classes="imagenette")
    says(ValueError, "did you mean 'imagewoof'", classes="imagewoofs")
    folder = root / "train" / WOOF[3]
    (folder / "dead.JPEG").symlink_to(tmp_path / "nothing")
    says(ValueError, "1 file besides its images: .*dead.JPEG; a class folder holds .*no link that leads nowhere")
    (folder / "dead.JPEG").unlink()
    (root / "val" / "ILSVRC2012_val_00000007.JPEG").touch()
    says(ValueError, "val has 1 image beside its class folders: ILSVRC2012_val_00000007.JPEG")
    (root / "val" / "ILSVRC2012_val_00000007.JPEG").unlink()
    (root / "val" / "cats").mkdir()
    says(ValueError, "val has 1 folder besides its 10 classes: cats", classes="")
    shutil.rmtree(folder)
    folder.mkdir()
    says(ValueError, f"train has 1 class folder without images: {WOOF[3]}")
    shutil.rmtree(root / "val")
    says(FileNotFoundError, "has no val/ folder; expected train/<class>/ and val/<class>/")
    (root / "val").mkdir()
    says(FileNotFoundError, "has no class folders; expected val/<class>")
    (root / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    says(FileNotFoundError, "ImageNet's original validation folder, 1 file not sorted by class; move each into val/<wnid>/")
    shutil.rmtree(root / "train")
    (root / "train").mkdir(), (root / "train" / "n01440764.tar").touch()
    says(FileNotFoundError, r"archives that are not unpacked \(n01440764.tar\); unpack each")
