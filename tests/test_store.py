"""The store under fire: damaged payloads, killed processes, two processes that want the same cell; and what a key depends on."""

import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import ddkit
from ddkit import runs
from ddkit.profiles import load_profile

SMOKE = load_profile("smoke")

# a process that computes one cell: it leaves a mark when it starts, and takes as long as it is told
COMPUTES = """
import sys, time
from pathlib import Path
from ddkit import runs
from ddkit.profiles import load_profile

def slow(cell, store, folder):
    (folder / "half.txt").write_text("half")
    with open(sys.argv[2], "a") as marks: marks.write("started\\n")
    time.sleep(float(sys.argv[3]))
    (folder / "whole.txt").write_text("whole")
    return {"images": 1}

runs.COMPUTE["distill"] = slow
print(runs.Store(sys.argv[1]).compute(runs.distill_cell(load_profile("smoke"), "random", 2, 0)).summary)
"""


@pytest.fixture
def store(tmp_path):
    return runs.Store(tmp_path / "runs")


@pytest.fixture
def cell():
    return runs.distill_cell(SMOKE, "random", 2, 0)


@pytest.fixture
def computed(monkeypatch):
    """Distilling becomes writing two files; the list says which cells were computed."""
    done = []

    def toy(cell, store, folder):
        done.append(cell)
        (folder / "0").mkdir()
        (folder / "0" / "a.png").write_bytes(b"pixels")
        (folder / "manifest.json").write_text("{}")
        return {"images": 1}

    monkeypatch.setitem(runs.COMPUTE, "distill", toy)
    monkeypatch.setitem(runs.LOAD, "distill", lambda cell, folder: (folder / "0" / "a.png").read_bytes())
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
        first, second = store.compute(cell), runs.Store(store.root).compute(cell)
    assert len(computed) == 1 and first.seconds == second.seconds


def test_a_large_payload_is_hashed_when_it_is_loaded(store, cell, computed, monkeypatch):
    monkeypatch.setattr(runs, "SMALL", 0)
    store.compute(cell)
    overwrite(store.path(cell))
    assert store.has(cell) and store.verify(cell)  # the size is right
    with pytest.warns(UserWarning, match="another checksum"): assert store.load(cell) == b"pixels"
    assert len(computed) == 2


def test_a_failure_leaves_nothing(store, cell, monkeypatch):
    def fails(cell, store, folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("no ink")
    monkeypatch.setitem(runs.COMPUTE, "distill", fails)
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
    assert change(SAMPLING) != SAMPLING and runs.bare_code(change(SAMPLING)) == runs.bare_code(SAMPLING)


def test_docstrings_are_no_code_and_numbers_are():
    assert runs.bare_code('def f(x):\n    "Doc."\n    return x') == runs.bare_code("def f(x): return x")
    assert runs.bare_code('class A:\n    """Doc."""') == runs.bare_code("class A: pass")
    assert runs.bare_code("def f(x=1): return x") != runs.bare_code("def f(x=2): return x")
    assert runs.bare_code(SAMPLING) != runs.bare_code(SAMPLING + "\nsteps = 3\n")


def test_code_of_a_kind_counts_for_that_kind_alone(monkeypatch):
    def keys():
        full = runs.evaluate_cell(SMOKE, "full", 0, 0, "convnet6")
        return [c.key for c in (runs.encode_cell(SMOKE), runs.distill_cell(SMOKE, "mgd3", 2), runs.distill_cell(SMOKE, "igd", 2), full, runs.measure_cell(SMOKE, "mgd3", 2))]

    before, kit_code = keys(), runs.kit_code
    def changed(module):
        runs.code_digest.cache_clear()
        monkeypatch.setattr(runs, "kit_code", lambda name: kit_code(name) + "x = 1" * (name == module))
        return [a != b for a, b in zip(before, keys())]

    try:  # encode, distill, distill by a method that trains a network first, evaluate, measure
        assert changed("sampling") == [False, True, True, False, True]
        assert changed("protocols") == [False, False, True, True, True]
        assert changed("protocols.Classifier") == [False, False, True, False, True]
        assert changed("metrics") == [False, False, False, False, True]
        assert changed("backbones") == [True, True, True, False, True]
        assert changed("reports") == [False] * 5
    finally:
        monkeypatch.undo()
        runs.code_digest.cache_clear()


def test_a_plugin_counts_with_its_source(tmp_path):
    code = "from ddkit.methods import register\n@register('{name}')\ndef first(workshop): return helper(workshop)\ndef helper(workshop): return workshop.choose('random')  # {comment}\n"
    def key(name, text):
        (tmp_path / name).write_text(text)
        return runs.distill_cell(SMOKE.replace(plugins=(str(tmp_path / name),)), name.removesuffix(".py"), 2).identity["registered"]

    a, b = key("plug-a.py", code.format(name="plug-a", comment="x")), key("plug-b.py", code.format(name="plug-b", comment="y"))
    assert a and a[0].replace("plug-a", "plug-b") == b[0]
    assert key("plug-c.py", code.format(name="plug-c", comment="x").replace("'random'", "'herding'"))[0].replace("plug-c", "plug-a") != a[0]


def test_weights_count_by_content(tmp_path):
    def key(path, content):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return runs.distill_cell(SMOKE.replace(generator="dit", weights=str(path)), "dit", 2).key

    first = key(tmp_path / "a" / "dit.pt", b"weights")
    assert key(tmp_path / "b" / "other.pt", b"weights") == first
    assert key(tmp_path / "a" / "dit.pt", b"WEIGHTS") != first


def test_digests_of_large_files_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("DDKIT_RUNS", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "dit.pt").write_bytes(b"weights")
    first = runs.weights_digest(tmp_path / "dit.pt")
    runs._digests.cache_clear()  # as a new process would
    monkeypatch.setattr(runs, "file_sha256", lambda path: pytest.fail("hashed again"))
    assert runs.weights_digest(tmp_path / "dit.pt") == first
    runs._digests.cache_clear()


def test_nothing_stays_undecided():
    """Every field of a profile counts for some kind of cell, or for the methods that read it, or is listed as having no effect."""
    from dataclasses import fields
    counted = set().union(*runs.IDENTITY.values(), *runs.READ.values(), *runs.EXTRACTOR_READS.values(), runs.ELSEWHERE)
    assert counted | runs.WITHOUT_EFFECT == {f.name for f in fields(SMOKE)} and not counted & runs.WITHOUT_EFFECT


# features, teachers, seeds together

def test_features_are_computed_once_per_set_and_extractor(tmp_path):
    store, two = runs.Store(tmp_path), runs.measure_cell(SMOKE.replace(features="judge denoiser"), "random", 2)
    store.compute(two)
    assert sorted(r["cell"] for r in store.records() if r["kind"] == "features") == [f"features {e} {of} seed 0" for e in ("denoiser", "judge") for of in ("full", "random ipc 2")]
    def written(): return {r["cell"]: (r["path"] / "cell.json").stat().st_mtime_ns for r in store.records() if r["kind"] == "features"}
    before = written()
    store.discard(two); store.compute(two)
    assert written() == before
    features, labels = store.load(runs.features_cell(SMOKE, "random", 2))
    assert features.shape == (20, 64) and labels.tolist() == [c for c in range(10) for _ in range(2)]


def test_seeds_together_are_the_cells_that_they_are_alone(tmp_path):
    """The same keys, one pass, accuracies that differ by rounding at most; what is there already is not trained again."""
    quick = SMOKE.replace(epochs=1, evaluations=1)
    alone, together = runs.Store(tmp_path / "alone"), runs.Store(tmp_path / "together")
    def wanted(profile): return [runs.evaluate_cell(profile, "random", 2, seed, "convnet6") for seed in (0, 1, 2)]
    three = wanted(quick.replace(seeds_together=3))
    assert [c.key for c in three] == [c.key for c in wanted(quick)]
    assert runs.in_company([three[0], runs.measure_cell(quick, "random", 2), *three[1:]]) == [three, [runs.measure_cell(quick, "random", 2)]]
    together.compute(three[1])
    results = together.compute_together(three)
    assert [r.value["settings"]["together"] for r in results] == [2, 1, 2] and [r.value["settings"]["seed"] for r in results] == [0, 1, 2]
    for cell, result in zip(three, results): assert abs(result.value["last"] - alone.compute(cell).value["last"]) <= 1  # of 540 test images, at most five near the border


def test_a_teacher_is_a_cell_that_all_students_share(tmp_path):
    store, quick = runs.Store(tmp_path), SMOKE.replace(**{"soft.epochs": 1})
    students = [runs.evaluate_cell(quick, "random", 2, seed, "convnet6", "soft") for seed in (0, 1)]
    told = [store.compute(cell).value["settings"]["teacher"] for cell in students]
    assert told[0] == told[1] and told[0]["network"] == "resnet18"
    assert [r["cell"] for r in store.records() if r["cell"].endswith("full seed 0")] == ["evaluate resnet18 hard-batchnorm full seed 0"]


def test_a_protocol_of_ones_own_counts_with_its_code(tmp_path):
    code = "from dataclasses import replace\nfrom ddkit.protocols import get_protocol, protocol\n@protocol('{name}', 'short', 'mine')\ndef mine(profile, ipc, classes): return replace(get_protocol('hard').values(profile, ipc, classes), {changes})\n"
    def key(name, changes):
        (tmp_path / f"{name}.py").write_text(code.format(name=name, changes=changes))
        return runs.evaluate_cell(SMOKE.replace(plugins=(str(tmp_path / f"{name}.py"),)), "full", 0, 0, "convnet6", name).identity
    a, b = key("first-protocol", "epochs=1"), key("second-protocol", "momentum=0.5")
    assert a["training"]["momentum"] == 0.9 and b["training"]["momentum"] == 0.5 and a["registered"] != b["registered"]


def test_values_count_for_the_protocols_that_read_them():
    def keys(**changes):
        profile = SMOKE.replace(teacher="teacher.pth", normalization="half", **changes)
        full = runs.evaluate_cell(profile, "full", 0, 0, "vit")
        return [runs.evaluate_cell(profile, "random", 2, 0, "convnet6", protocol).key for protocol in ("hard", "soft")] + [full.key]

    def changed(**changes): return [a != b for a, b in zip(keys(), keys(**changes))]
    assert changed(learning_rate=0.05) == [True, False, False]  # vit has a learning rate of its own in this profile
    assert changed(epochs=3) == [True, False, False]  # on the whole real set: full_epochs
    assert changed(**{"soft.temperature": 4}) == [False, True, False]
    assert changed(**{"hard.learning_rate.vit": 0.02}) == [False, False, True]
    assert changed(**{"soft.epochs.resnet18": 9}) == [False, False, False]  # of another network
    one = lambda network, file: runs.evaluate_cell(SMOKE.replace(teacher=file, **{"hard-igd.labels.resnet50": "soft"}), "random", 2, 0, network, "hard-igd").key
    assert one("resnet50", "a.pth") != one("resnet50", "b.pth") and one("resnet18", "a.pth") == one("resnet18", "b.pth")


def test_encoding_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    from ddkit import backbones
    store, cell, encode, seen = runs.Store(tmp_path), runs.encode_cell(SMOKE.replace(batch_size=500)), backbones.Backbone.encode, []
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
    assert (resumed == runs.Store(tmp_path / "fresh").load(cell)[0]).all()


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
    text = runs.canonical(runs.provenance([runs.distill_cell(SMOKE, "random", 2)], SMOKE.replace(root=str(tmp_path))))
    assert str(tmp_path) not in text and time.strftime("%Y-%m-%d") not in text
