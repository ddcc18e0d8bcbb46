"""The store under fire: damaged payloads, killed processes, two processes that want the same cell."""

import json
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ddkit
from ddkit import backbones, fingerprints, runs
from ddkit import store as stores
from ddkit.facts import bare_code
from ddkit.files import canonical
from ddkit.fingerprints import weights_digest
from ddkit.profiles import load_profile
from ddkit.store import Store
from ddkit.work import Distill, distill_cell, encode_cell, evaluate_cell, features_cell, in_company, measure_cell

SMOKE = load_profile("smoke")

# a process that computes one cell: it leaves a mark when it starts, and takes as long as it is told
COMPUTES = """
import sys, time
from ddkit.profiles import load_profile
from ddkit.store import Store
from ddkit.work import Distill, distill_cell

cell = distill_cell(load_profile("smoke"), "random", 2, 0)
cell.key  # before the toy: this process and the test agree about the name

def slow(kind, cell, session, folder):
    (folder / "half.txt").write_text("half")
    with open(sys.argv[2], "a") as marks: marks.write("started\\n")
    time.sleep(float(sys.argv[3]))
    (folder / "whole.txt").write_text("whole")
    return {"images": 1}

Distill.compute = slow
print(Store(sys.argv[1]).compute(cell).summary)
"""


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


@pytest.fixture
def cell():
    """A cell that knows its name before a test replaces what computes it."""
    cell = distill_cell(SMOKE, "random", 2, 0)
    assert cell.key
    return cell


@pytest.fixture
def computed(monkeypatch):
    """Distilling becomes writing two files; the list says which cells were computed."""
    done = []

    def toy(kind, cell, session, folder):
        done.append(cell)
        (folder / "0").mkdir()
        (folder / "0" / "a.png").write_bytes(b"pixels")
        (folder / "manifest.json").write_text("{}")
        return {"images": 1}

    monkeypatch.setattr(Distill, "compute", toy)
    monkeypatch.setattr(Distill, "load", lambda kind, cell, folder: (folder / "0" / "a.png").read_bytes())
    monkeypatch.setattr(Distill, "hashed_by_store", None)  # the toy does not look at its bytes itself
    return done


def start(store, marks, seconds):
    return subprocess.Popen([sys.executable, "-c", COMPUTES, store.root, marks, str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def test_a_killed_process_leaves_nothing_that_counts(store, cell, tmp_path):
    marks = tmp_path / "marks"
    victim = start(store, marks, 60)
    wait_for(marks.exists)
    assert store.sweep() == []  # what a living process works on is left alone
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not store.has(cell) and not store.path(cell).exists()
    assert list((store.root / "tmp").iterdir())  # its leftovers

    heir = start(store, marks, 0)
    out, err = heir.communicate(timeout=60)
    assert heir.returncode == 0 and out == "1 images\n", err
    assert store.verify(cell) is None
    assert {p.name for p in store.path(cell).iterdir()} == {"half.txt", "whole.txt", "cell.json"}
    assert not list((store.root / "tmp").iterdir())
    assert marks.read_text() == "started\n" * 2


def test_leftovers_of_the_dead_are_swept(store, tmp_path):
    marks = tmp_path / "marks"
    victim = start(store, marks, 60)
    wait_for(marks.exists)
    victim.kill()
    victim.wait()
    assert len(store.sweep()) == 1 and not list((store.root / "tmp").iterdir())


def test_two_processes_compute_a_cell_once(store, cell, tmp_path):
    marks = tmp_path / "marks"
    both = [start(store, marks, 2), start(store, marks, 2)]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out == "1 images\n", err
    assert marks.read_text() == "started\n"


def overwrite(folder):
    (folder / "0" / "a.png").write_bytes(b"PIXELS")


def append(folder):
    with open(folder / "0" / "a.png", "ab") as file: file.write(b"!")


def remove(folder):
    (folder / "0" / "a.png").unlink()


def add(folder):
    (folder / "0" / "b.png").write_bytes(b"more")


def edit_summary(folder):
    record = json.loads((folder / "cell.json").read_text())
    (folder / "cell.json").write_text(json.dumps(record | {"value": {"images": 99}}))


def truncate_summary(folder):
    (folder / "cell.json").write_text("{")


def remove_summary(folder):
    (folder / "cell.json").unlink()


@pytest.mark.parametrize("damage, told", [
    (overwrite, "0/a.png has another checksum"), (append, "0/a.png has another size"), (remove, "0/a.png is gone"), (add, "0/b.png does not belong there"),
    (edit_summary, "cell.json was changed"), (truncate_summary, "does not parse"), (remove_summary, "is gone or does not parse"),
])
def test_damage_is_named_and_repaired(store, cell, computed, damage, told):
    store.compute(cell)
    damage(store.path(cell))
    assert not store.has(cell)
    with pytest.raises(FileNotFoundError, match="compute it"): store.get(cell)
    with pytest.warns(UserWarning, match=f"distill random ipc 2 seed 0 in .* is damaged .*{told}"): store.compute(cell)
    assert store.verify(cell) is None and len(computed) == 2
    assert store.get(cell).value == {"images": 1}


def test_an_intact_cell_is_not_computed_again(store, cell, computed):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = store.compute(cell), Store(store.root).compute(cell)
    assert len(computed) == 1 and first.seconds == second.seconds


def test_a_large_payload_is_hashed_when_it_is_loaded(store, cell, computed, monkeypatch):
    monkeypatch.setattr(stores, "SMALL", 0)
    store.compute(cell)
    overwrite(store.path(cell))
    assert store.has(cell) and store.verify(cell)  # the size is right
    with pytest.warns(UserWarning, match="another checksum"): assert store.load(cell) == b"pixels"
    assert len(computed) == 2


def test_two_that_see_the_same_damage_compute_once(store, cell, computed, monkeypatch):
    """The second finds the cell mended once it holds the lock, and must not throw away what the first one made."""
    monkeypatch.setattr(stores, "SMALL", 0)
    store.compute(cell)
    overwrite(store.path(cell))
    both_saw, lock = threading.Barrier(2), Store.lock
    def after_both_saw(self, cell):
        both_saw.wait(60)
        return lock(self, cell)

    monkeypatch.setattr(Store, "lock", after_both_saw)
    with ThreadPoolExecutor(2) as pool, pytest.warns(UserWarning, match="another checksum") as told:
        loaded = list(pool.map(lambda one: one.load(cell), [Store(store.root), Store(store.root)]))
    assert loaded == [b"pixels"] * 2 and len(computed) == 2 and len(told) == 1


def test_a_value_that_is_not_finite_is_kept_as_none(store, cell, monkeypatch):
    """It breaks nothing after the computation, when the description is sealed."""
    monkeypatch.setattr(Distill, "compute", lambda kind, cell, session, folder: {"images": 1, "high": float("inf"), "low": [-float("inf"), float("nan")]})
    assert store.compute(cell).value == {"images": 1, "high": None, "low": [None, None]} and store.verify(cell) is None


@pytest.mark.parametrize("text, told", [("{", "distill cell"), ('{"kind": "distill"}', "distill cell"), ('{"cell": "a set", "seconds": 1}', "a set")])
def test_a_torn_description_is_listed_and_not_counted(store, cell, computed, text, told):
    store.compute(cell)
    (store.path(cell) / "cell.json").write_text(text)
    (name, folder, why), = store.damaged()
    assert name == told and folder == store.path(cell) and "cell.json" in why
    assert store.records() == [] and runs.history(store) == {}


def test_a_failure_leaves_nothing(store, cell, monkeypatch):
    def fails(kind, cell, session, folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("no ink")
    monkeypatch.setattr(Distill, "compute", fails)
    with pytest.raises(RuntimeError, match="no ink"): store.compute(cell)
    assert not store.has(cell) and not list((store.root / "tmp").iterdir())


def test_a_folder_that_snakemake_made_in_advance_is_no_cell(store, cell, computed):
    store.path(cell).mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.compute(cell)
    assert store.has(cell)


# what a key depends on

SAMPLING = (Path(ddkit.__file__).parent / "sampling.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", [lambda s: "# a comment\n" + s, lambda s: s.replace("\n\n", "\n\n\n"), lambda s: s.replace("# ", "#  "),
                                    lambda s: s.replace("def sample(", "def sample(  # the one sampler\n"), lambda s: s + "\n__all__ = ['sample']\n"])
def test_comments_and_formatting_are_no_code(change):
    assert change(SAMPLING) != SAMPLING and bare_code(change(SAMPLING)) == bare_code(SAMPLING)


def test_docstrings_are_no_code_and_numbers_are():
    assert bare_code('def f(x):\n    "Doc."\n    return x') == bare_code("def f(x): return x")
    assert bare_code('class A:\n    """Doc."""') == bare_code("class A: pass")
    assert bare_code("def f(x=1): return x") != bare_code("def f(x=2): return x")
    assert bare_code(SAMPLING) != bare_code(SAMPLING + "\nsteps = 3\n")


def test_digests_of_large_files_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("DDKIT_RUNS", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "dit.pt").write_bytes(b"weights")
    first = weights_digest(tmp_path / "dit.pt")
    fingerprints._digests.cache_clear()  # as a new process would
    monkeypatch.setattr(fingerprints, "file_sha256", lambda path: pytest.fail("hashed again"))
    assert weights_digest(tmp_path / "dit.pt") == first
    fingerprints._digests.cache_clear()


# features, teachers, seeds together

def test_features_are_computed_once_per_set_and_extractor(tmp_path):
    store, two = Store(tmp_path), measure_cell(SMOKE.replace(features="judge denoiser"), "random", 2)
    store.compute(two)
    assert sorted(r["cell"] for r in store.records() if r["kind"] == "features") == [f"features {e} {of} seed 0" for e in ("denoiser", "judge") for of in ("full", "random ipc 2")]
    def written(): return {r["cell"]: (r["path"] / "cell.json").stat().st_mtime_ns for r in store.records() if r["kind"] == "features"}
    before = written()
    store.discard(two); store.compute(two)
    assert written() == before
    features, labels = store.load(features_cell(SMOKE, "random", 2))
    assert features.shape == (20, 64) and labels.tolist() == [c for c in range(10) for _ in range(2)]


def counted(monkeypatch, counts, place):
    """Count the calls of a function of the kit."""
    module, name = place.rsplit(".", 1)
    function = getattr(sys.modules[module], name)
    monkeypatch.setattr(place, lambda *given, **named: (counts.update([name]), function(*given, **named))[1])


def test_a_process_loads_generator_data_and_sets_once(tmp_path, monkeypatch):
    """An ablation over the sampler's values shares generator and data; networks that learn from a set share the set."""
    store, counts = Store(tmp_path), Counter()
    ablation = [distill_cell(profile, "mgd3", 2, scale=scale) for profile in (SMOKE, SMOKE.replace(cfg_scale=2.0, epochs=1)) for scale in (0.1, 0.2)]
    students = [evaluate_cell(SMOKE, "random", 2, 0, network) for network in ("convnet6", "resnetap10")]
    cells = [*ablation, features_cell(SMOKE, "mgd3", 2, extractor="denoiser"), *students]
    for cell in cells: cell.key
    for place in ("ddkit.backbones.load_embedded", "ddkit.data.load_digits_data", "ddkit.work.load_distilled"): counted(monkeypatch, counts, place)
    for cell in cells: store.compute(cell)
    assert counts == {"load_embedded": 1, "load_digits_data": 1, "load_distilled": 2}  # the sets of mgd3 and random


def test_seeds_together_are_the_cells_that_they_are_alone(tmp_path):
    """The same keys, one pass, accuracies that differ by rounding at most; what is there already is not trained again."""
    quick = SMOKE.replace(epochs=1, evaluations=1)
    alone, together = Store(tmp_path / "alone"), Store(tmp_path / "together")
    def wanted(profile): return [evaluate_cell(profile, "random", 2, seed, "convnet6") for seed in (0, 1, 2)]
    three = wanted(quick.replace(seeds_together=3))
    assert [c.key for c in three] == [c.key for c in wanted(quick)]
    assert in_company([three[0], measure_cell(quick, "random", 2), *three[1:]]) == [three, [measure_cell(quick, "random", 2)]]
    together.compute(three[1])
    results = together.compute_together(three)
    assert [r.value["settings"]["together"] for r in results] == [2, 1, 2] and [r.value["settings"]["seed"] for r in results] == [0, 1, 2]
    for cell, result in zip(three, results): assert abs(result.value["last"] - alone.compute(cell).value["last"]) <= 1  # of 540 test images, at most five near the border


def test_a_teacher_is_a_cell_that_all_students_share(tmp_path):
    store, quick = Store(tmp_path), SMOKE.replace(**{"soft.epochs": 1})
    students = [evaluate_cell(quick, "random", 2, seed, "convnet6", "soft") for seed in (0, 1)]
    told = [store.compute(cell).value["settings"]["teacher"] for cell in students]
    assert told[0] == told[1] and told[0]["network"] == "resnet18"
    assert [r["cell"] for r in store.records() if r["cell"].endswith("full seed 0")] == ["evaluate resnet18 hard-batchnorm full seed 0"]


def test_a_protocol_of_ones_own_counts_with_its_code(tmp_path):
    code = "from dataclasses import replace\nfrom ddkit.protocols import get_protocol, protocol\n@protocol('mine', 'short', 'mine')\ndef mine(profile, ipc, classes): return replace(get_protocol('hard').values(profile, ipc, classes), {changes})\n"
    def cell(name, changes):
        (tmp_path / f"{name}.py").write_text(code.format(changes=changes))
        return evaluate_cell(SMOKE.replace(plugins=(str(tmp_path / f"{name}.py"),)), "full", 0, 0, "convnet6", "mine")
    a, b = cell("a", "epochs=1"), cell("b", "momentum=0.5")
    assert a.values["training"]["momentum"] == 0.9 and b.values["training"]["momentum"] == 0.5 and a.key != b.key


def test_values_count_for_the_protocols_that_read_them():
    def keys(**changes):
        profile = SMOKE.replace(teacher="teacher.pth", normalization="half", **changes)
        full = evaluate_cell(profile, "full", 0, 0, "vit")
        return [evaluate_cell(profile, "random", 2, 0, "convnet6", protocol).key for protocol in ("hard", "soft")] + [full.key]

    def changed(**changes): return [a != b for a, b in zip(keys(), keys(**changes))]
    assert changed(learning_rate=0.05)[0] and changed(epochs=3)[0] and changed(full_epochs=3)[2]
    assert changed(**{"soft.temperature": 4}) == [False, True, False]
    assert changed(**{"hard.learning_rate.vit": 0.02})[::2] == [False, True]
    assert changed(**{"soft.epochs.resnet18": 9}) == [False, False, False]  # of another network
    one = lambda network, file: evaluate_cell(SMOKE.replace(teacher=file, **{"hard-igd.labels.resnet50": "soft"}), "random", 2, 0, network, "hard-igd").key
    assert one("resnet50", "a.pth") != one("resnet50", "b.pth") and one("resnet18", "a.pth") == one("resnet18", "b.pth")


def test_encoding_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    store, cell, encode, seen = Store(tmp_path), encode_cell(SMOKE.replace(batch_size=500, per_class=0)), backbones.Backbone.encode, []
    def dying(self, images):
        seen.append(len(images))
        if len(seen) == 3: raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(backbones.Backbone, "encode", dying)
    with pytest.raises(KeyboardInterrupt): store.compute(cell)
    assert not store.has(cell) and (tmp_path / "partial" / cell.key / "count").read_text() == "1000"
    seen.append(0)
    resumed = store.load(cell)[0]
    assert seen[-1:] == [257] and not (tmp_path / "partial" / cell.key).exists()
    monkeypatch.undo()
    assert (resumed == Store(tmp_path / "fresh").load(cell)[0]).all()


# provenance

def git(folder, *args):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=folder, check=True, capture_output=True)


def test_commit_of_a_checkout_and_of_none(tmp_path, monkeypatch):
    kit = tmp_path / "kit"
    (kit / "ddkit").mkdir(parents=True)
    (kit / "ddkit" / "__init__.py").write_text("")
    monkeypatch.setattr(ddkit, "__file__", str(kit / "ddkit" / "__init__.py"))
    assert runs.commit() is None  # no repository
    git(tmp_path, "init")
    assert runs.commit() is None  # somebody else's
    git(kit, "init")
    assert runs.commit() is None  # nothing committed yet
    git(kit, "add", "."), git(kit, "commit", "-m", "kit")
    first = runs.commit()
    assert len(first) == 40
    (kit / "tables").mkdir(), (kit / "tables" / "t.csv").write_text("1")
    git(kit, "add", "."), git(kit, "commit", "-m", "an artefact")
    assert runs.commit() == first  # artefacts don't count
    (kit / "ddkit" / "__init__.py").write_text("x = 1")
    assert runs.commit() == f"{first}-dirty"


def test_provenance_holds_no_paths_and_no_dates(tmp_path):
    text = canonical(runs.provenance([distill_cell(SMOKE, "random", 2)], SMOKE.replace(root=str(tmp_path))))
    assert str(tmp_path) not in text and time.strftime("%Y-%m-%d") not in text
