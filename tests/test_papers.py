"""Every paper notebook, and the training notebook, executed by papermill on the smoke profile."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ddkit.papers import outputs, select

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def regenerated():
    """`ddkit reproduce` on the smoke profile: the engine and every notebook, once."""
    done = subprocess.run([BIN / "ddkit", "reproduce", "--profile", "smoke", "--jobs", "2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("artefact", select(), ids=lambda a: a.name)
def test_notebook_writes_every_format(regenerated, artefact):
    for path in outputs(artefact, "smoke"):
        assert (ROOT / path).stat().st_size > 0, path
        assert str(path) in regenerated or str(path.parent) in regenerated


@pytest.mark.parametrize("artefact", select(), ids=lambda a: a.name)
def test_captions_say_what_ran(regenerated, artefact):
    for path in outputs(artefact, "smoke"):
        if path.suffix != ".json": continue
        caption = json.loads((ROOT / path).read_text(encoding="utf-8"))["caption"]
        assert "smoke" in caption and re.search(r"[Ss]eed", caption), caption


@pytest.mark.parametrize("artefact", select(), ids=lambda a: a.name)
def test_figures_embed_their_fonts(regenerated, artefact):
    for path in outputs(artefact, "smoke"):
        if path.suffix == ".pdf": assert b"/Type3" not in (ROOT / path).read_bytes(), f"{path}: journals refuse Type 3 fonts"


AGAIN = ("manifoldgd/table1", "manifoldgd/fig4", "comparison/table2")  # a table, a figure, and one that writes both


@pytest.mark.parametrize("artefact", [a if a.name in AGAIN else pytest.param(a, marks=pytest.mark.slow) for a in select()], ids=lambda a: a.name)
def test_notebook_runs_by_itself_and_gives_the_same_bytes(regenerated, artefact, tmp_path):
    before = {path: (ROOT / path).read_bytes() for path in outputs(artefact, "smoke")}
    command = [BIN / "papermill", ROOT / artefact.notebook, tmp_path / "out.ipynb", "-k", "python3", "-p", "profile", "smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for path, content in before.items():
        assert (ROOT / path).read_bytes() == content, f"{path} changed in a second regeneration"


def test_nothing_is_left_to_do(regenerated):
    done = subprocess.run([BIN / "ddkit", "reproduce", "--profile", "smoke"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "nothing to do" in done.stdout.lower()


def test_training_notebook_runs(tmp_path):
    notebook = ROOT / "nbs/training_the_embedded_generator.ipynb"
    parameters = {"out": tmp_path / "assets", "vae_steps": 2, "dit_steps": 2, "samples_per_class": 1, "wanted": 0.0}
    command = [BIN / "papermill", notebook, tmp_path / "out.ipynb", "-k", "python3", *(x for k, v in parameters.items() for x in ("-p", k, str(v)))]
    done = subprocess.run(command, cwd=ROOT / "nbs", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in (tmp_path / "assets").iterdir()} == {"embedded_vae.safetensors", "embedded_dit.safetensors", "embedded_generator.json"}
