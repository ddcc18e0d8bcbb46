"""The batch engine on a tiny profile: plans, kills, resumes, damage, failures. One story; its tests share a store and run in order."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddkit.files import named_lock
from ddkit.store import Store, problem
from ddkit.workers import first_free, gpu_slot

ROOT = Path(__file__).resolve().parent.parent
DDKIT = Path(sys.executable).parent / "ddkit"

TINY = """
[tiny]
inherits = smoke
ipcs = 1
seeds = 0 1
steps = 2
mgd3.stop = 1
manifoldgd.stop = 1
epochs = 1
full_epochs = 1
features = judge

[broken]
inherits = tiny
plugins = broken.py

[no-judge]
inherits = tiny
normalization = imagenet
feature_weights = nowhere/resnet18.pth
"""
BROKEN = "from ddkit.methods import register\n@register('broken')\ndef broken(workshop): raise RuntimeError('no ink left')\n"


class Project:
    """A kit of its own: settings, workflow and paper notebooks in a temporary folder."""

    def __init__(self, root):
        self.root, self.runs = root, root / "runs"
        (root / "settings.ini").write_text((ROOT / "settings.ini").read_text(encoding="utf-8") + TINY, encoding="utf-8")
        (root / "broken.py").write_text(BROKEN)
        for folder in ("workflow", "nbs/papers"): shutil.copytree(ROOT / folder, root / folder)
        self.temporary = root / "tmp"
        self.temporary.mkdir()
        self.environment = {k: v for k, v in os.environ.items() if k != "DDKIT_RUNS"} | {"TMPDIR": str(self.temporary)}

    def start(self, *arguments):
        return subprocess.Popen([DDKIT, "reproduce", "--only", "fig4", "--jobs", "2", *arguments], cwd=self.root, env=self.environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore Ctrl-C, and their children would

    def reproduce(self, *arguments):
        process = self.start(*arguments)
        out, err = process.communicate(timeout=900)
        return process.returncode, out, err

    def cells(self):
        """Finished cells: folder → what its cell.json says."""
        return {p.parent: p.read_text() for p in self.runs.glob("*/*/cell.json")}

    def wait_for_cells(self, count, process):
        end = time.monotonic() + 600
        while len(self.cells()) < count:
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.05)

    def processes(self):
        """Ids of living processes that work for this project."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try: line = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError: continue
            if str(self.runs) in line: found.append(int(folder.name))
        return found

    def rewrite_plugin(self, code):
        (self.root / "broken.py").write_text(BROKEN.replace("raise RuntimeError('no ink left')", code))

    def drop_a_measurement(self):
        """Remove a cell that figure 4 shows, so that there is something to do."""
        shutil.rmtree(next(folder for folder, text in self.cells().items() if json.loads(text)["cell"] == "measure judge random ipc 1 seed 0"))

    def assert_all_intact(self):
        for folder in self.cells(): assert problem(folder, thorough=True) is None

    def assert_nothing_runs(self):
        end = time.monotonic() + 10
        while self.processes() and time.monotonic() < end: time.sleep(0.1)
        assert not self.processes()
        assert not list(self.temporary.glob("ddkit-*")) and not list(self.temporary.glob("snakemake*"))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("a kit"))  # a path with a space, on purpose


def test_a_dry_run_changes_nothing(project):
    before = sorted(project.root.rglob("*"))
    code, out, err = project.reproduce("--profile", "tiny", "--dry-run")
    assert code == 0 and not err, err
    assert "0 in runs, 33 to compute" in out and "manifoldgd/fig4: 10 cells to compute" in out and "(--dry-run)" in out
    assert "more than once" not in out  # a single artefact shares nothing
    assert sorted(project.root.rglob("*")) == before


def test_what_is_missing_is_said_before_anything_runs(project):
    code, out, err = project.reproduce("--profile", "no-judge")
    assert code == 2 and "nowhere/resnet18.pth" in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert not (project.runs / "plans").exists() and not project.cells()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_a_killed_head_takes_everything_with_it(project):
    head = project.start("--profile", "tiny")
    project.wait_for_cells(3, head)
    assert project.processes()
    head.send_signal(signal.SIGKILL)
    head.communicate()
    project.assert_nothing_runs()
    project.assert_all_intact()
    assert 3 <= len(project.cells()) < 33


def test_ctrl_c_stops_in_order(project):
    before = len(project.cells())
    head = project.start("--profile", "tiny")
    project.wait_for_cells(before + 1, head)
    head.send_signal(signal.SIGINT)
    out, err = head.communicate(timeout=600)
    assert head.returncode == 130 and "goes on from there" in err and "Traceback" not in err
    project.assert_nothing_runs()
    project.assert_all_intact()


def test_the_next_call_goes_on_from_there(project):
    before = project.cells()
    code, out, err = project.reproduce("--profile", "tiny")
    assert code == 0, out + err
    assert f"33 cells, {len(before)} in runs, {33 - len(before)} to compute" in out
    after = project.cells()
    assert len(after) == 33 and before.items() <= after.items()  # nothing was computed twice
    lines = [line for line in out.splitlines() if line.startswith("[")]
    assert len(lines) == 34 - len(before) and lines[-1].startswith("[34/34] manifoldgd/fig4") and all("left)" in line for line in lines[:-1])
    assert "Done in" in out and "figures/tiny/manifoldgd/fig4 .pdf .svg .png" in out
    for ending in (".pdf", ".svg", ".png", ".json"): assert (project.root / f"figures/tiny/manifoldgd/fig4{ending}").stat().st_size > 0
    assert not list((project.runs / "tmp").iterdir())


def artefact_bytes(project):
    return {p: p.read_bytes() for p in (project.root / "figures").rglob("*") if p.is_file()}


def test_then_there_is_nothing_to_do(project):
    plans, started = sorted((project.runs / "plans").iterdir()), time.monotonic()
    code, out, err = project.reproduce("--profile", "tiny")
    assert code == 0 and out.startswith("Nothing to do: 1 artefact up to date, 33 cells in runs.") and "figures/tiny/manifoldgd/fig4 .pdf" in out and not err
    assert time.monotonic() - started < 60 and sorted((project.runs / "plans").iterdir()) == plans


def test_damage_is_repaired_and_the_bytes_stay(project):
    figures, before = artefact_bytes(project), project.cells()
    image = next(project.runs.glob("distill/*/3/00000.png"))
    image.write_bytes(bytes(len(image.read_bytes())))
    metrics = next(project.runs.glob("measure/*/metrics.json"))
    metrics.write_text("{}")
    code, out, err = project.reproduce("--profile", "tiny")
    assert code == 0 and err.count("ddkit: warning: ") == 2 and "is damaged (3/00000.png has another checksum)" in err and "is damaged (metrics.json has another size)" in err, err
    project.assert_all_intact()
    assert {f for f, text in before.items() if project.cells()[f] != text} == {image.parent.parent, metrics.parent}
    assert artefact_bytes(project) == figures


def test_a_changed_artefact_is_made_again(project):
    figures = artefact_bytes(project)
    (project.root / "figures/tiny/manifoldgd/fig4.png").write_bytes(b"painted over")
    (project.root / "figures/tiny/manifoldgd/fig4.svg").unlink()
    code, out, err = project.reproduce("--profile", "tiny")
    assert code == 0 and "33 in runs, 0 to compute" in out, out + err
    assert artefact_bytes(project) == figures
    assert len(list((project.runs / "plans").iterdir())) == 1  # those of earlier calls are gone


def test_artefacts_without_a_store_do_not_count(project):
    """A fresh clone has the committed tables and figures, and no store."""
    code, out, err = project.reproduce("--profile", "tiny", "--dry-run", "--runs", str(project.root / "elsewhere"))
    assert code == 0 and "1 to make" in out and "33 to compute" in out


def test_snakemake_by_hand(project):
    project.drop_a_measurement()
    command = [Path(sys.executable).parent / "snakemake", "--snakefile", "workflow/Snakefile", "--cores", "2", "--keep-incomplete", "--config", "profile=tiny", "only=fig4"]
    done = subprocess.run(command, cwd=project.root, env=project.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(project.cells()) == 33 and len(list((project.runs / "plans").iterdir())) == 2
    assert project.reproduce("--profile", "tiny")[1].startswith("Nothing to do")


def test_a_failing_cell_is_explained_and_the_rest_is_done(project):
    """A plugin's method takes part in every artefact; here it fails, for both of its seeds."""
    code, out, err = project.reproduce("--profile", "broken")
    assert code == 1 and "39 cells, 33 in runs, 6 to compute" in out
    for seed in (0, 1): assert f"failed: distill broken ipc 1 seed {seed}: no ink left" in out
    assert "RuntimeError: no ink left" in err
    log = next(line.removeprefix("--- ") for line in err.splitlines() if line.startswith("--- runs/plans"))
    assert "no ink left" in (project.root / log).read_text() and "goes on from there" in err
    assert not (project.root / "figures/broken").exists() and len(project.cells()) == 33

    project.rewrite_plugin("__import__('os').kill(__import__('os').getpid(), 9)")  # as the system does when memory runs out
    code, out, err = project.reproduce("--profile", "broken")
    assert code == 1 and "killed by signal 9, out of memory?" in out and "killed by signal 9" in err
    project.assert_all_intact()

    project.rewrite_plugin("return workshop.choose('random')")
    code, out, err = project.reproduce("--profile", "broken")
    assert code == 0 and len(project.cells()) == 39, out + err
    assert "broken" in (project.root / "figures/broken/manifoldgd/fig4.json").read_text()


def test_outside_a_checkout_it_says_so(project, tmp_path):
    (tmp_path / "settings.ini").write_text("[mine]\ninherits = smoke\n")
    done = subprocess.run([DDKIT, "reproduce", "--profile", "mine"], cwd=tmp_path, env=project.environment, capture_output=True, text=True)
    assert done.returncode == 2 and "the package does not contain; clone the kit" in done.stderr and done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["settings.ini"]


def test_a_second_head_waits_for_the_first(project):
    project.drop_a_measurement()
    with named_lock(project.runs, "engine"):
        head = project.start("--profile", "tiny")
        assert head.stdout.readline().startswith("another `ddkit reproduce` works on this store")
        time.sleep(0.5)
        assert len(project.cells()) == 38
    out, err = head.communicate(timeout=600)
    assert head.returncode == 0 and "32 in runs, 1 to compute" in out, out + err


def test_each_worker_gets_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DDKIT_GPUS", "4,7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    seen = []
    with gpu_slot(tmp_path):
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        with gpu_slot(tmp_path):
            seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
            assert first_free(tmp_path, ["4", "7"]) is None  # a third would wait
    with gpu_slot(tmp_path): seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4", "7", "4"]
    monkeypatch.delenv("DDKIT_GPUS")
    with gpu_slot(tmp_path): pass  # without the variable nothing is chosen
