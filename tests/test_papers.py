"""Every paper notebook on the smoke profile, and the training notebook.

Here all paper notebooks run after each other in few processes, which saves most of their time; that the batch engine and
papermill write the same bytes is tested with three of them, and with all of them among the slow tests.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from ddkit.papers import outputs, select

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
FOLDER = ROOT / "runs/notebooks/tested"  # within the checkout, whose settings the notebooks look for
every_artefact = pytest.mark.parametrize("artefact", select(), ids=lambda a: a.name)


def with_profile(notebook: Path, profile: str):
    """A notebook with a cell after its parameters, as papermill adds one."""
    content = nbformat.read(ROOT / notebook, as_version=4)
    place = next(i for i, cell in enumerate(content.cells) if "parameters" in cell.metadata.get("tags", []))
    content.cells.insert(place + 1, nbformat.v4.new_code_cell(f"profile = {profile!r}"))
    return content


@pytest.fixture(scope="session")
def regenerated():
    """All tables and figures of the smoke profile, made once."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for artefact in select():
        nbformat.write(with_profile(artefact.notebook, "smoke"), FOLDER / f"{artefact.name.replace('/', '-')}.ipynb")
        for file in outputs(artefact, "smoke"): (ROOT / file).unlink(missing_ok=True)
    done = subprocess.run([BIN / "nbdev-test", "--n-workers", "2", FOLDER], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@every_artefact
def test_notebook_writes_every_format(regenerated, artefact):
    for path in outputs(artefact, "smoke"): assert (ROOT / path).stat().st_size > 0, path


@every_artefact
def test_captions_say_what_ran(regenerated, artefact):
    for path in outputs(artefact, "smoke"):
        if path.suffix != ".json": continue
        caption = json.loads((ROOT / path).read_text(encoding="utf-8"))["caption"]
        assert "smoke" in caption and re.search(r"[Ss]eed", caption), caption


@every_artefact
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


TIMED = ("manifoldgd/fig11",)  # shows how long its cells took


@pytest.mark.slow
def test_the_engine_makes_the_same_files(regenerated, tmp_path):
    """`ddkit reproduce`, from an empty store; then there is nothing left to do."""
    same = [artefact for artefact in select() if artefact.name not in TIMED]
    before = {path: (ROOT / path).read_bytes() for artefact in same for path in outputs(artefact, "smoke")}
    command = [BIN / "ddkit", "reproduce", "--profile", "smoke", "--jobs", "2", "--runs", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for path, content in before.items():
        assert (ROOT / path).read_bytes() == content, path
        assert f"{path.parent / path.name.partition('.')[0]} ." in done.stdout, path  # the stem, before its endings
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Nothing to do")


@pytest.mark.slow
def test_training_notebook_runs(tmp_path):
    notebook = ROOT / "nbs/training_the_embedded_generator.ipynb"
    parameters = {"out": tmp_path / "assets", "vae_steps": 2, "dit_steps": 2, "batch_size": 16, "samples_per_class": 1, "wanted": 0.0}
    command = [BIN / "papermill", notebook, tmp_path / "out.ipynb", "-k", "python3", *(x for k, v in parameters.items() for x in ("-p", k, str(v)))]
    done = subprocess.run(command, cwd=ROOT / "nbs", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in (tmp_path / "assets").iterdir()} == {"embedded_vae.safetensors", "embedded_dit.safetensors", "embedded_generator.json"}
