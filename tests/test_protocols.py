"""Training and protocols beyond what their notebooks show.

Where images live, stored labels, running statistics, memory-mapped sets, weight decay, every protocol from start to end,
and what a result depends on."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from ddkit import protocols, training
from ddkit.augmentations import AUGMENTATIONS, MIXES, check_steps
from ddkit.code import reached
from ddkit.data import load_digits_data
from ddkit.images import ImageSet, RealData
from ddkit.networks import create_network, network_names
from ddkit.profiles import Training, load_profile
from ddkit.protocols import (
    PROTOCOLS, Teacher, evaluate, evaluate_together, get_protocol, imagenet_rows, load_teacher, needs_teacher, protocol,
    protocol_names, real_epochs, teacher_from_file, teacher_from_weights, train_and_test, train_on_real, training_values,
)
from ddkit.registry import Registry
from ddkit.training import ask, make_batch, make_optimizer, make_resident, matrix_names, stream, student, teacher_loss, train_networks

torch.set_num_threads(1)
SMOKE, WOOF, CPU = load_profile("smoke"), load_profile("imagewoof").replace(device="cpu"), torch.device("cpu")


@pytest.fixture(scope="module")
def data(): return load_digits_data()


@pytest.fixture(scope="module")
def few(data):
    chosen = torch.cat([data.train.of_class(c)[:4] for c in range(10)])
    return ImageSet(data.train.pixels[chosen], data.train.labels[chosen])


@pytest.fixture(scope="module")
def teacher(data): return train_on_real(SMOKE, "resnet18", data=data, protocol="hard-batchnorm")


@pytest.mark.parametrize("name", protocol_names())
def test_every_protocol_runs_and_says_what_ran(name, few, data, teacher):
    scores = evaluate(few, SMOKE, "resnet18", name, data=data, teacher=teacher)
    values = training_values(SMOKE, name, 4, 10)
    assert scores.settings["protocol"] == name and scores.settings["source"] == get_protocol(name).source
    assert scores.settings["epochs"] == values.epochs == 2 and scores.settings["steps"] == 2 * -(-40 // values.batch_size)
    assert scores.settings["norm"] == ("batch" if any(isinstance(m, nn.BatchNorm2d) for m in scores.network.modules()) else "instance")
    assert ("teacher" in scores.settings) == needs_teacher(SMOKE, name) == name.startswith("soft")


MINIMAX, RDED = ("crop", "flip", "color", "lighting", "cutmix"), ("shuffle", "crop", "flip", "cutmix")
COLUMNS = ("epochs", "batch_size", "learning_rate", "weight_decay", "optimizer", "schedule", "labels", "temperature", "norm", "tested", "test_view", "crop_scale", "augmentations")
RELEASED = {  # ten classes with ten images each, ResNet-18
    "hard":            (2000, 64, 0.01, 5e-4, "sgd", "steps", "hard", 1, "instance", "throughout", "whole", 0.5, MINIMAX),
    "hard-batchnorm":  (2000, 64, 0.01, 5e-4, "sgd", "steps", "hard", 1, "batch", "throughout", "whole", 0.5, MINIMAX),
    "hard-plain":      (2000, 64, 0.01, 5e-4, "sgd", "steps", "hard", 1, "instance", "throughout", "whole", 0.5, ()),
    "hard-igd":        (2000, 64, 0.001, 0.01, "adamw", "steps", "hard", 1, "instance", "throughout", "whole", 0.5, MINIMAX),
    "hard-d3hr":       (2000, 50, 0.001, 0.01, "adamw", "half-cosine", "hard", 1, "batch", "last-hundred", "centre", 0.08, ("crop", "flip", "mixup")),
    "hard-ims3":       (2000, 64, 0.1, 5e-4, "sgd", "steps", "hard", 1, "instance", "throughout", "whole", 0.5, ("crop", "flip", "randaugment", "color", "lighting", "cutmix")),
    "hard-ims3-paper": (300, 64, 0.1, 5e-4, "sgd", "cosine", "hard", 1, "instance", "throughout", "whole", 0.5, ("crop", "flip", "randaugment", "color", "lighting", "cutmix")),
    "soft":            (300, 50, 0.001, 0.01, "adamw", "half-cosine", "soft", 20, "batch", "last-fifth", "centre", 0.5, RDED),
    "soft-plain":      (300, 50, 0.001, 0.01, "adamw", "half-cosine", "soft", 20, "batch", "last-fifth", "centre", 0.5, ()),
    "soft-sre2l":      (300, 100, 0.001, 0.01, "adamw", "cosine", "stored", 20, "batch", "throughout", "centre", 0.08, ("crop", "flip", "cutmix")),  # batch 1,024, and there are 100 images
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_values_on_the_papers_profile(name):
    values = training_values(WOOF, name, 10, 10)
    assert {column: getattr(values, column) for column in COLUMNS} == dict(zip(COLUMNS, RELEASED[name]))
    check_steps(WOOF, values)


def test_every_protocol_of_the_kit_has_a_row():
    assert set(RELEASED) == {name for name in protocol_names() if get_protocol(name).values.__module__ == "ddkit.protocols"}


def test_bytes_on_the_host_give_the_same_run(few, data, teacher, monkeypatch):
    larger = ImageSet(F.interpolate(few.pixels, size=(24, 24)), few.labels)
    here = evaluate(larger, SMOKE, "convnet6", "soft", data=data, teacher=teacher)
    monkeypatch.setattr(training, "fits", lambda count, device: False)
    there = evaluate(larger, SMOKE, "convnet6", "soft", data=data, teacher=teacher)
    assert here.curve == there.curve and here.losses == there.losses
    assert all(torch.equal(a, b) for a, b in zip(here.network.state_dict().values(), there.network.state_dict().values()))
    assert (here.settings["resident"], there.settings["resident"]) == ({"train": "device", "test": "device"}, {"train": "host", "test": "host"})


def test_a_memory_mapped_set_is_read_by_batches(few, data, tmp_path, monkeypatch):
    stored = np.lib.format.open_memmap(tmp_path / "pixels.npy", "w+", np.uint8, (40, 1, 20, 20))
    stored[:] = F.interpolate(few.pixels, size=(20, 20)).numpy()
    mapped = ImageSet(torch.from_numpy(stored), few.labels)
    seen, view = [], training.VIEWS["whole"]
    monkeypatch.setattr(training, "VIEWS", {"whole": lambda pixels, size: seen.append(len(pixels)) or view(pixels, size)})
    monkeypatch.setattr(training, "fits", lambda count, device: count < 20_000 and device.type != "cpu")
    evaluate(mapped, SMOKE.replace(eval_batch_size=16, epochs=1, evaluations=1), "convnet6", data=data)
    assert max(seen) <= 32  # a batch, or a test batch


def test_stored_labels_are_the_same_for_every_seed(few, data, teacher):
    values = training_values(SMOKE, "soft-sre2l", 4, 10)
    batches = [make_batch(few.pixels, few.labels, values, "half", stream(values, seed)).images for seed in (0, 1)]
    assert torch.equal(*batches)
    own = [make_batch(few.pixels, few.labels, values, "half", stream(replace(values, labels="soft"), seed)).images for seed in (0, 1)]
    assert not torch.equal(*own)
    told = ask(teacher, batches[0], values)
    assert torch.equal(told, told.half().float())
    assert not torch.equal(told, ask(teacher, batches[0], replace(values, labels="soft")))
    a, b = (evaluate(few, SMOKE, "convnet6", "soft-sre2l", seed, data, teacher=teacher) for seed in (0, 1))
    assert a.losses != b.losses  # their initial weights differ


def test_soft_statistics_are_those_of_a_double_pass(few, data, teacher):
    "RDED's trainer runs the student twice on every batch; a momentum of 0.19 leaves the same running statistics."
    values = replace(training_values(SMOKE, "soft", 4, 10), epochs=2)
    images = make_resident(few, "the set", SMOKE, 10, CPU, "whole")
    ours = student("resnet18", 10, SMOKE, 0, CPU, values)
    for _ in train_networks([ours], [images], values, SMOKE, [0], teacher): pass
    theirs, draws = student("resnet18", 10, SMOKE, 0, CPU, replace(values, norm_passes=1)), stream(values, 0)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]; rest = [p for p in theirs.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": rest, "weight_decay": 0.0}], lr=values.learning_rate, betas=(0.9, 0.999), weight_decay=0.01)
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5 * (1 + np.cos(np.pi * epoch / values.epochs / 2)))
    for _ in range(2):
        theirs.train()
        for part in torch.randperm(40, generator=draws).split(values.batch_size):
            batch = make_batch(few.pixels[part], few.labels[part], values, "half", draws)
            with torch.no_grad(): theirs(batch.images)
            loss = teacher_loss(theirs(batch.images), teacher(batch.images))
            optimizer.zero_grad(); loss.backward(); optimizer.step()
        falls.step()
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        if a.ndim > 1 or "running" in name: assert (a - b).norm() <= 0.01 * b.norm(), name  # AdamW makes a full step of rounding where a gradient is nothing else


def test_together_leaves_networks_of_their_own(few, data):
    first, second = evaluate_together([few, few], SMOKE, "convnet6", "hard-batchnorm", (0, 1), data)
    storages = [{t.untyped_storage().data_ptr() for t in s.network.state_dict().values()} for s in (first, second)]
    assert not storages[0] & storages[1]
    assert first.settings["together"] == 2 and (first.settings["seed"], second.settings["seed"]) == (0, 1)


class Dropping(nn.Module):
    def __init__(self, *_, **__): super().__init__(); self.fc = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 10))
    def forward(self, images): return self.fc(images)


def test_dropout_has_random_numbers_of_its_own(few, data, monkeypatch):
    monkeypatch.setattr(training, "create_network", Dropping)
    before = torch.get_rng_state()
    first = evaluate(few, SMOKE, "convnet6", data=data)
    torch.rand(7); other_state = torch.get_rng_state()
    again, other = evaluate_together([few, few], SMOKE, "convnet6", "hard", (0, 1), data)
    assert first.losses == again.losses != other.losses and again.settings["together"] == 1
    assert torch.equal(torch.get_rng_state(), other_state) and not torch.equal(before, other_state)


@pytest.mark.parametrize("network", ["swint", "mobilenetv2"])  # stochastic depth; dropout
def test_noisy_networks_repeat_and_leave_the_global_random_state_alone(network, few, data):
    short = SMOKE.replace(epochs=1, evaluations=1)
    first = evaluate(few, short, network, data=data)
    torch.rand(7); before = torch.get_rng_state()
    again, other = evaluate_together([few, few], short, network, "hard", (0, 1), data)
    assert torch.equal(before, torch.get_rng_state())
    assert first.curve == again.curve and first.losses == again.losses != other.losses
    assert all(torch.equal(a, b) for a, b in zip(first.network.state_dict().values(), again.network.state_dict().values()))
    assert again.settings["together"] == 1


def test_no_global_random_state_is_touched(few, data, teacher):
    before = torch.get_rng_state()
    for name in ("soft", "hard-ims3", "hard-d3hr"): evaluate(few, SMOKE, "convnet6", name, data=data, teacher=teacher)
    assert torch.equal(before, torch.get_rng_state())


def test_memory_format_changes_the_layout_only(few, data):
    plain, last = (evaluate(few, SMOKE.replace(memory_format=layout), "resnet18", data=data) for layout in ("contiguous", "channels-last"))
    assert (plain.settings["memory_format"], last.settings["memory_format"]) == ("contiguous", "channels-last")
    np.testing.assert_allclose([l for _, l in plain.losses], [l for _, l in last.losses], atol=1e-2)


@pytest.fixture
def three():
    pictures = ImageSet(torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)), torch.arange(3))
    return RealData(pictures, pictures, ["a", "b", "c"], ["a", "b", "c"])


def test_a_teacher_for_exactly_the_classes_stays_as_it_is(tmp_path, three):
    whole = create_network("resnet18", 3, norm="batch").eval()
    torch.save(whole.state_dict(), tmp_path / "three.pth")
    loaded = load_teacher(WOOF.replace(teacher=str(tmp_path / "three.pth")), three)
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): torch.testing.assert_close(loaded.network(picture), whole(picture))
    assert not any(p.requires_grad for p in loaded.network.parameters())
    assert loaded.origin == "three.pth" and loaded.accuracy in (0, 100 / 3, 200 / 3, 100)


def test_a_wrapped_checkpoint_gives_the_same_teacher(tmp_path, three):
    weights = create_network("resnet18", 3, norm="batch").state_dict()
    torch.save(weights, tmp_path / "bare.pth")
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "wrapped.pth")
    bare, wrapped = (load_teacher(WOOF.replace(teacher=str(tmp_path / name)), three, accuracy=0.0) for name in ("bare.pth", "wrapped.pth"))
    assert bare.digest == wrapped.digest


@pytest.mark.parametrize("name, content, message", [
    ("list.pth", [1, 2], "holds no state dict"), ("garbage.pth", b"garbage", "is no torch checkpoint"), ("garbage.safetensors", b"garbage", "is no readable safetensors file"),
    ("empty.pth", b"", "is no torch checkpoint"), ("other.pth", {"encoder.bias": torch.zeros(3)}, "has no last layer named fc or classifier")])
def test_damaged_teachers_get_one_line(name, content, message, tmp_path, three):
    if isinstance(content, bytes): (tmp_path / name).write_bytes(content)
    else: torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} {message}") as caught: load_teacher(WOOF.replace(teacher=str(tmp_path / name)), three)
    assert "\n" not in str(caught.value)


def test_what_is_known_about_a_teacher_travels_with_it(few, data, teacher, monkeypatch):
    trained = load_teacher(SMOKE, data)
    training = evaluate(data.train, SMOKE, "resnet18", "hard-batchnorm", 0, data, real_epochs(SMOKE, data))
    assert trained.accuracy == training.last and trained.origin == "trained on the real training set"
    asked, count = [], protocols.count_hits
    monkeypatch.setattr(protocols, "count_hits", lambda network, *args: asked.append(network) or count(network, *args))
    short = SMOKE.replace(**{"soft.epochs": 1})
    def said(given): return evaluate(few, short, "convnet6", "soft", data=data, teacher=given).settings["teacher"]
    told = load_teacher(SMOKE, data, trained.network.state_dict(), accuracy=12.5)
    assert said(trained) == {"network": "resnet18", "origin": trained.origin, "digest": trained.digest, "accuracy": trained.accuracy}
    assert said(told) == said(trained) | {"accuracy": 12.5}
    assert trained.network not in asked and told.network not in asked  # only students are tested
    assert said(trained.network) == said(trained.network.state_dict()) == said(trained) | {"origin": "given"}


def test_noisy_networks_share_one_teacher_and_prepare_each_set_once(few, data, monkeypatch):
    loaded, prepared, load, prepare = [], [], protocols.load_teacher, protocols.make_resident
    monkeypatch.setattr(protocols, "load_teacher", lambda *args: loaded.append(args) or load(*args))
    monkeypatch.setattr(protocols, "make_resident", lambda source, *args: prepared.append(source) or prepare(source, *args))
    others = ImageSet(few.pixels.flip(3), few.labels)
    scores = evaluate_together([few, others], SMOKE.replace(full_epochs=1, **{"soft.epochs": 1}), "mobilenetv2", "soft", (0, 1), data)
    assert len(loaded) == 1 and scores[0].settings["teacher"] == scores[1].settings["teacher"]
    assert sum(source is few for source in prepared) == sum(source is others for source in prepared) == 1


def test_a_teacher_for_other_classes_is_refused(few, data):
    other = Teacher(create_network("resnet18", 7, 16, 1, 1 / 8, norm="batch").eval(), "given", 0.0)
    with pytest.raises(ValueError, match="the teacher tells 7 classes apart, and the data has 10"): evaluate(few, SMOKE, "convnet6", "soft", data=data, teacher=other)


def test_rows_of_imagenet_keep_the_order_of_the_data(data):
    names = ["dingo", "beagle"]
    assert imagenet_rows(RealData(None, None, names, names, imagenet=(273, 162))) == [273, 162]
    with pytest.raises(ValueError, match="the 10 classes of the data are not ImageNet's"): imagenet_rows(data)


def mine(profile, ipc, classes): return Training(1, 1, 0.1, 0.0, ())


def test_a_taken_name_of_a_protocol_is_refused():
    hard = get_protocol("hard")
    with pytest.raises(ValueError, match="protocol 'hard' exists already"): protocol("hard", "", "")(mine)
    assert get_protocol("hard") is hard
    try:
        for about in ("first", "again"): protocol("mine", about, "")(mine)  # as when a cell is run twice
        assert get_protocol("mine").about == "again"
    finally: PROTOCOLS.remove("mine")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("name, spared", [
    ("resnet18", set()), ("convnet6", set()), ("vit", {"class_token", "position"}),
    ("vitb16", {"body.embeddings.cls_token", "body.embeddings.position_embeddings"})])
def test_only_matrices_that_are_called_a_weight_decay(name, spared, optimizer):
    "As released, by RDED: a matrix of another name, such as a class token, keeps its size."
    network = create_network(name, 10, 16, 1, 1 / 8, norm="batch")
    matrices, values = matrix_names(network), Training(1, 1, 0.1, 0.01, (), optimizer=optimizer, decayed="matrices")
    before = {part: weight.detach().clone() for part, weight in network.named_parameters()}
    steps = make_optimizer(dict(network.named_parameters()), values, matrices)
    for weight in network.parameters(): weight.grad = torch.zeros_like(weight)
    steps.step()  # without gradients, only the decay moves a weight, by a share of 0.1 · 0.01
    moved = {part for part, weight in network.named_parameters() if not torch.equal(weight, before[part])}
    assert moved == matrices - spared and spared < matrices


@pytest.mark.parametrize("name", network_names())
def test_everything_decays_unless_a_protocol_spares_it(name):
    network = create_network(name, 10, 16, 1, 1 / 8)
    (group,) = make_optimizer(dict(network.named_parameters()), Training(1, 1, 0.1, 0.01, ()), matrix_names(network)).param_groups
    assert len(group["params"]) == len(list(network.parameters())) and group["weight_decay"] == 0.01


class Watched:
    "A profile that notes which of its fields are read."
    def __init__(self, profile): self.profile, self.read = profile, set()
    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.profile, name)


SEEN = {"device", "eval_size", "channels", "network_width", "normalization", "precision", "memory_format"}


@pytest.mark.parametrize("name", protocol_names())
def test_training_reads_no_field_that_a_protocol_is_made_of(name, few, data, teacher, monkeypatch):
    values = training_values(SMOKE, name, 4, 10)
    gives = None if values.labels == "hard" else Teacher(teacher, "given", 0.0, "resnet18")
    told = evaluate(few, SMOKE, "resnet18", name, data=data, teacher=gives)
    monkeypatch.setattr(protocols, "PROTOCOLS", Registry("protocol"))  # none is known any more
    watched = Watched(SMOKE)
    (core,) = train_and_test([few], watched, "resnet18", values, [0], data, gives, name)
    assert watched.read == SEEN
    assert core.curve == told.curve and core.losses == told.losses
    assert core.settings | {"source": told.settings["source"]} == told.settings


@pytest.mark.parametrize("name", protocol_names())
@pytest.mark.parametrize("network", ["convnet6", "resnet18", "vit"])
def test_a_result_depends_on_what_its_values_name_and_no_more(name, network):
    "As `ddkit.code` walks from `train_and_test`: no protocol, no other network, no augmentation that isn't asked for."
    values = training_values(WOOF, name, 10, 10, network)
    found = reached([train_and_test], WOOF, [network, name, asdict(values)])
    assert found.reads == SEEN
    entries = {kind: {word for of, word in found.entries if of == kind} for kind, _ in found.entries}
    asked = set(values.augmentations)
    assert entries == {kind: words for kind, words in {
        "network": {network}, "norm": {values.norm}, "normalization": {"imagenet"}, "augmentation": asked & set(AUGMENTATIONS),
        "mix": asked & set(MIXES), "view of a test image": {"whole", values.test_view}}.items() if words}


def test_a_ready_teacher_needs_no_protocol(data, teacher, three, tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "PROTOCOLS", Registry("protocol"))
    watched = Watched(SMOKE)
    loaded = teacher_from_weights(watched, data, teacher.state_dict(), 50.0)
    assert (loaded.accuracy, loaded.name) == (50.0, "resnet18") and watched.read == SEEN - {"normalization"} | {"teacher_network"}
    torch.save(create_network("resnet18", 3, norm="batch").state_dict(), tmp_path / "three.pth")
    watched = Watched(WOOF.replace(teacher=str(tmp_path / "three.pth")))
    assert teacher_from_file(watched, three).accuracy in (0, 100 / 3, 200 / 3, 100)
    assert watched.read == SEEN - {"network_width", "memory_format"} | {"teacher_network", "teacher"}


def test_a_teacher_without_a_name_is_the_profiles(few, data, teacher):
    said = evaluate(few, SMOKE, "convnet6", "soft", data=data, teacher=Teacher(teacher, "given", 0.0)).settings["teacher"]
    assert said["network"] == SMOKE.teacher_network
    said = evaluate(few, SMOKE, "convnet6", "soft", data=data, teacher=Teacher(teacher, "given", 0.0, "mine")).settings["teacher"]
    assert said["network"] == "mine"


def test_test_images_at_a_time_change_nothing_but_time(few, data):
    values = training_values(SMOKE, "hard", 4, 10)
    first, other = (train_and_test([few], SMOKE, "convnet6", values, [0], data, test_batch=size)[0] for size in (128, 50))
    assert first.losses == other.losses  # training sees nothing of it
    np.testing.assert_allclose([a for _, a in first.curve], [a for _, a in other.curve], atol=100 / 540 * 1.5)  # rounding may decide one image
