"""The command line as a user meets it: what works, and what a mistake gets (one line, exit code 2, nothing half-written)."""

import json
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import pytest

from ddkit import cli
from ddkit.papermilling import NotebookError, run_notebook
from ddkit.profiles import SHIPPED
from ddkit.sets import load_distilled

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def ddkit(monkeypatch, capsys, tmp_path):
    """Run a command in this process; returns exit code, stdout, stderr. The store is a new one for each test."""
    monkeypatch.setenv("DDKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() sets its own
    monkeypatch.chdir(ROOT)

    def run(command):
        monkeypatch.setattr(sys, "argv", ["ddkit", *shlex.split(command)])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended: cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


def notebook(path, *sources, tag="parameters"):
    """A notebook whose first cell carries a tag."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    book.cells[0].metadata["tags"] = [tag]
    nbformat.write(book, path)
    return path


MISTAKES = {
    "profiles digitz": "unknown profile 'digitz'; did you mean 'digits'?",
    "distill mdg3 --profile smoke --out {tmp}/out": "unknown method 'mdg3'; did you mean 'mgd3'?",
    "distill full --profile smoke --out {tmp}/out": "nothing to distil",
    "distill random --profile smok --out {tmp}/out": "unknown profile 'smok'; did you mean 'smoke'?",
    "distill random --profile smoke --ipc 0 --out {tmp}/out": "ipc = 0",
    "distill herding --profile smoke --ipc 500 --out {tmp}/out": "500",
    "distill mgd3 --profile smoke --ipc 500 --out {tmp}/out": "500",
    "distill mgd3 --profile smoke --ipc 1 --set mgd3.stop=60 --out {tmp}/out": "60",
    "distill mgd3 --profile smoke --ipc 1 --set stop=4 --out {tmp}/out": "write mgd3.stop and manifoldgd.stop",
    "distill mgd3 --profile smoke --ipc 1 --set mgd3.scal=4 --out {tmp}/out": "did you mean mgd3.scale?",
    "distill mgd3 --profile smoke --ipc 1 --set mdg3.scale=4 --out {tmp}/out": "did you mean 'mgd3'?",
    "distill mgd3 --profile smoke --ipc 1 --set mgd3.scale=much --out {tmp}/out": "should be a number",
    "distill mgd3 --profile smoke --ipc 1 --option scal=4 --out {tmp}/out": "did you mean 'scale'?",
    "distill mgd3 --profile smoke --ipc 1 --option scale=much --out {tmp}/out": "should be a number",
    "distill mgd3 --profile smoke --ipc 1 --option scale=1 --option scale=2 --out {tmp}/out": "is given twice",
    "methods mdg3": "did you mean 'mgd3'?",
    "protocols hrad": "did you mean 'hard'?",
    "check digitz": "did you mean 'digits'?",
    "init {tmp}/full": "exists and is not empty; nothing is overwritten",
    "init {tmp}/full/file.txt": "exists; nothing is overwritten",
    "distill mgd3 --profile smoke --ipc 1 --set sampler=ddmp --out {tmp}/out": "did you mean 'ddpm'?",
    "distill mgd3 --profile smoke --ipc 1 --set steps=many --out {tmp}/out": "should be a whole number",
    "distill mgd3 --profile smoke --ipc 1 --set stepz=8 --out {tmp}/out": "did you mean 'steps'?",
    "distill mgd3 --profile smoke --ipc 1 --set steps --out {tmp}/out": "should be NAME=VALUE",
    "distill random --profile imagewoof --ipc 1 --out {tmp}/out": "has no data root",
    "distill random --profile imagewoof --ipc 1 --set root={tmp}/nowhere --out {tmp}/out": "nowhere' is missing",
    "distill random --profile smoke --ipc 1 --out {tmp}/full": "exists and is not empty",
    "distill random --profile smoke --ipc 1 --out {tmp}/full/file.txt": "exists",
    "evaluate manifold --profile smoke": "did you mean 'manifoldgd'?",
    "evaluate no/such/folder --profile smoke": "no folder no/such/folder",
    "evaluate {tmp}/full --profile smoke": "has no class folders",
    "evaluate random --profile smoke --ipc 1 --network resnet81": "unknown network 'resnet81'; did you mean 'resnet18'?",
    "evaluate random --profile smoke --ipc 1 --protocol hrad": "did you mean 'hard'?",
    "measure randon --profile smoke": "did you mean 'random'?",
    "run {tmp}/none.ipynb": "no notebook",
    "run {tmp}/good.ipynb -p profil smoke": "unknown parameter of good.ipynb: 'profil'; did you mean 'profile'?",
    "run {tmp}/untagged.ipynb -p profile smoke": "no cell tagged 'parameters'",
    "run {tmp}/full/file.txt": "is no notebook",
    "run {tmp}/good.ipynb --out {tmp}/full/file.txt": "exists",
    "reproduce --paper manifoldg --profile smoke": "unknown paper 'manifoldg'; did you mean 'manifoldgd'?",
    "reproduce --only table1,tabel2 --profile smoke": "unknown table or figure 'tabel2'; did you mean 'table2'?",
    "reproduce --profile digitz": "unknown profile 'digitz'; did you mean 'digits'?",
    "reproduce --profile imagewoof --only fig4": "profile 'imagewoof' has no data root",
    "reproduce --profile paper --only table1": "profile 'imagenette' has no data root",
    "status --profile digitz": "unknown profile 'digitz'; did you mean 'digits'?",
    "distill random --profile smoke --out {tmp}/out --set name=foo": "--set name: a profile's name cannot be set",
    "distill random --profile smoke --out {tmp}/out --option seed=3": "--option seed: no method has it; write --seed",
    "evaluate full --profile smoke --ipc 3": "--ipc is for methods, and full is none",
    "measure {tmp}/full --profile smoke --option k=3": "--option is for methods, and",
    "reproduce --profile smoke --only ''": "--only names nothing",
    "distill random --profile smoke --set resnet18.width=3 --out {tmp}/out": "nothing that has options is called 'resnet18'",
    "distill random --profile smoke --set kmeans.seed=3 --out {tmp}/out": "nobody takes it",
    "status --runs {tmp}/full/file.txt": "file.txt",
    "distill random --profile smoke --ipc 1 --out {tmp}/full/file.txt/out": "file.txt",
    "run {tmp}/good.ipynb -p profile": "-p profile should be NAME=VALUE",
    "run {tmp}/good.ipynb -p profile smoke -p profile digits": "-p profile is given twice",
    "run {tmp}/good.ipynb --out {tmp}/full": "exists",
    "reproduce --profile smoke --only manifoldgd/table99": "unknown table or figure 'manifoldgd/table99'",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_gets_one_line(ddkit, tmp_path, command):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file.txt").write_text("mine")
    notebook(tmp_path / "good.ipynb", "profile = 'digits'")
    notebook(tmp_path / "untagged.ipynb", "profile = 'digits'", tag="other")
    code, out, err = ddkit(command.format(tmp=tmp_path))
    assert code == 2 and err.count("\n") == 1 and err.startswith("ddkit: "), err
    assert MISTAKES[command] in err and "Traceback" not in out + err
    assert not (tmp_path / "out").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["file.txt"]
    assert not list((tmp_path / "runs").rglob("*.png")) and not list((tmp_path / "runs" / "tmp").glob("*"))


@pytest.mark.parametrize("manifest, told", [
    ("", "JSONDecodeError"), ("{}", "KeyError"), ('{"classes": [], "files": {}}', "RuntimeError"), ("[1]", "TypeError")])
def test_a_manifest_that_is_none(ddkit, tmp_path, manifest, told):
    (tmp_path / "manifest.json").write_text(manifest)
    code, out, err = ddkit(f"measure {tmp_path} --profile smoke")
    assert code == 2 and "is not the manifest of a distilled set" in err and told in err and err.count("\n") == 1


def test_a_set_of_other_classes_is_not_scored_by_their_numbers(ddkit, tmp_path):
    assert ddkit(f"distill random --profile smoke --ipc 1 --out {tmp_path / 'set'}")[0] == 0
    file = tmp_path / "set" / "manifest.json"
    said = json.loads(file.read_text())
    for one in said["classes"]: one["label"] = (one["label"] + 1) % 10
    file.write_text(json.dumps(said))
    for command in ("evaluate", "measure"):
        code, out, err = ddkit(f"{command} {tmp_path / 'set'} --profile smoke")
        assert code == 2 and "has other classes than the data: its label 0 is 9, the data's 0" in err


@pytest.mark.parametrize("command", ["distill random --seed -1 --out y", "reproduce --jobs 0", "reproduce --jobs two", "distill random", "nonsense", "distill random --ipc x --out y", "status --nonsense"])
def test_wrong_usage_gets_exit_code_2(ddkit, command):
    code, out, err = ddkit(command)
    assert code == 2 and "Traceback" not in err and err


@pytest.mark.parametrize("settings, told", [("[digits\ndataset = digits", "does not parse"), ("[digits]\ndataset = digits\nimage_size = big", "image_size = 'big' should be a whole number")])
def test_a_settings_file_that_is_wrong(ddkit, tmp_path, monkeypatch, settings, told):
    (tmp_path / "settings.ini").write_text(settings)
    monkeypatch.chdir(tmp_path)
    code, out, err = ddkit("profiles digits")
    assert code == 2 and told in err and err.count("\n") == 1


def test_exit_code_and_line_of_the_real_command(tmp_path):
    done = subprocess.run([Path(sys.executable).parent / "ddkit", "profiles", "digitz"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("command", ["", *"distill evaluate measure run reproduce status profiles methods check init".split()])
def test_help_is_helpful(ddkit, command):
    code, out, err = ddkit(f"{command} --help")
    assert code == 0 and "Usage: ddkit" in out
    assert command == "" or f"Example: ddkit {command}" in out


def test_help_imports_nothing_heavy():
    code = "import sys, ddkit.cli; print(*{'torch', 'diffusers', 'pandas', 'sklearn', 'papermill', 'snakemake'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == []


def test_distil_evaluate_measure_and_status(ddkit, tmp_path):
    code, out, err = ddkit(f"distill random --profile smoke --ipc 2 --seed 1 --out {tmp_path / 'two'}")
    assert code == 0 and out == f"20 images in {tmp_path / 'two'}\n", err
    made = load_distilled(tmp_path / "two")
    assert len(made) == 20 and made.manifest["seed"] == 1 and not (tmp_path / "two" / "cell.json").exists()

    by_name = ddkit("evaluate random --profile smoke --ipc 2 --seed 1 --network convnet6")
    by_folder = ddkit(f"evaluate {tmp_path / 'two'} --profile smoke --seed 1 --network convnet6")
    assert by_name[0] == by_folder[0] == 0
    assert by_name[1].split(" on ")[1] == by_folder[1].split(" on ")[1]  # the same accuracies

    (tmp_path / "two" / "manifest.json").rename(tmp_path / "manifest.json")  # anybody's images in the dataset's class folders
    assert ddkit(f"evaluate {tmp_path / 'two'} --profile smoke --seed 1 --network convnet6")[1] == by_folder[1]
    (tmp_path / "manifest.json").rename(tmp_path / "two" / "manifest.json")

    metrics = ddkit("measure random --profile smoke --ipc 2 --seed 1")
    assert metrics[0] == 0 and metrics[1] == ddkit(f"measure {tmp_path / 'two'} --profile smoke")[1]
    assert set(metrics[1].split()[::2]) == {"l2_distance", "mmd", "frechet_distance", "representativeness", "diversity", "mmd_squared", "precision", "recall", "density", "coverage", "kernel_distance"}

    code, out, err = ddkit("status --profile smoke")
    assert code == 0 and [line.split()[:2] for line in out.splitlines()[2:8]] == [["encode", "1"], ["finetune", "0"], ["distill", "1"], ["evaluate", "2"], ["features", "4"], ["measure", "1"]]
    damaged = next((tmp_path / "runs" / "distill").glob("*/3/00000.png"))
    damaged.write_bytes(b"x")
    assert "damaged: distill random ipc 2 seed 1" in ddkit("status --profile smoke")[1]
    with warnings.catch_warnings():
        code, out, err = ddkit(f"distill random --profile smoke --ipc 2 --seed 1 --out {tmp_path / 'again'}")
    assert code == 0 and "ddkit: warning: distill random ipc 2 seed 1" in err and err.count("\n") == 1
    assert {p.relative_to(tmp_path / "two"): p.read_bytes() for p in (tmp_path / "two").rglob("*.png")} == {p.relative_to(tmp_path / "again"): p.read_bytes() for p in (tmp_path / "again").rglob("*.png")}


def test_methods_say_where_options_come_from(ddkit):
    code, out, err = ddkit("methods 'ims3 + dap' --profile smoke")
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in out.splitlines() if line.startswith("  ")}
    assert code == 0, err
    assert rows["groups"][1] == "signature" and rows["real"] == ["20", "dap.real of profile smoke"]
    assert rows["epochs"] == ["1", "difffit.epochs of profile smoke"]  # of the preparation, by its family
    assert "of the family difffit" in out


def test_set_and_option_lead_to_the_same_set(ddkit, tmp_path):
    ddkit(f"distill dap --profile smoke --ipc 1 --set dap.scale=3 --out {tmp_path / 'a'}")
    ddkit(f"distill dap --profile smoke --ipc 1 --option scale=3 --out {tmp_path / 'b'}")
    a, b = ((tmp_path / name / "manifest.json").read_text() for name in "ab")
    assert a == b and json.loads(a)["options"]["scale"] == 3


def test_check_finds_a_line_that_reaches_nobody(ddkit, tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[mine]\ninherits = digits\ndap.scal = 3\n")
    monkeypatch.chdir(tmp_path)
    code, out, err = ddkit("check mine")
    assert code == 1 and "dap.scal of profile 'mine': nobody takes it; did you mean dap.scale?" in out
    assert ddkit("check digits")[0] == 0


# a project of one's own

def test_init_writes_a_project_that_works(ddkit, tmp_path, monkeypatch):
    assert ddkit(f"init {tmp_path / 'mine'}")[0] == 0
    monkeypatch.chdir(tmp_path / "mine")
    settings = Path("settings.ini").read_text().replace("inherits = digits", "inherits = digits\nper_class = 20", 1)
    Path("settings.ini").write_text(settings)  # a little less to train on
    before = {p: p.read_bytes() for p in Path.cwd().iterdir()}
    code, out, err = ddkit("check mine")
    assert code == 0, out + err
    assert "typical.power of profile mine" in ddkit("methods typical --profile mine")[1]
    assert [line.split()[0] for line in ddkit("profiles")[1].splitlines()[:3]] == ["profile", "mine", "digits"]
    code, out, err = ddkit(f"run first_steps.ipynb --out {tmp_path / 'out.ipynb'}")
    assert code == 0, err
    text = json.dumps(nbformat.read(tmp_path / "out.ipynb", 4))
    assert "image/png" in text and "frechet_distance" in text
    assert {p: p.read_bytes() for p in Path.cwd().iterdir() if p.is_file()} == before


def test_the_shipped_settings_are_the_checkouts():
    assert (SHIPPED / "settings.ini").read_text() == (ROOT / "settings.ini").read_text(), "cp settings.ini ddkit/assets/"


@pytest.mark.parametrize("command", ["methods", "methods manifoldgd", "methods 'mgd3 + dap'", "networks", "protocols", "metrics", "profiles"])
def test_what_there_is_is_known_to_a_fresh_process(command, tmp_path):
    """Here all rooms of the kit are imported; a command of its own imports only what it asks for."""
    listed = subprocess.run([Path(sys.executable).parent / "ddkit", *shlex.split(command)], cwd=tmp_path, capture_output=True, text=True)
    assert listed.returncode == 0 and listed.stdout.count("\n") > 5, listed.stdout + listed.stderr


# notebooks

def test_run_passes_parameters_and_stamps_completion(ddkit, tmp_path):
    book = notebook(tmp_path / "book.ipynb", "profile = 'digits'\nipcs = [10]\nscale = 0.1", "print(profile, ipcs, scale)")
    code, out, err = ddkit(f"run {book} -p profile smoke -p ipcs '[1, 2]' -p scale 1e-3 --out {tmp_path / 'out.ipynb'}")
    assert code == 0, err
    done = nbformat.read(tmp_path / "out.ipynb", 4)
    assert done.cells[-1].outputs[0].text == "smoke [1, 2] 0.001\n" and done.metadata.ddkit.complete
    assert ddkit(f"run {book} --out {tmp_path / 'out.ipynb'}")[0] == 2  # never overwritten


@pytest.mark.parametrize("source, told", [
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("import os; os.kill(os.getpid(), 9)", "the kernel died"),
])
def test_a_notebook_that_fails_is_no_result(ddkit, tmp_path, source, told):
    book = notebook(tmp_path / "book.ipynb", "profile = 'digits'", source, "print('after')")
    code, out, err = ddkit(f"run {book} --out {tmp_path / 'out.ipynb'}")
    assert code == 1 and told in err and err.count("\n") == 1
    assert not (tmp_path / "out.ipynb").exists() and not list(tmp_path.glob(".out*"))


def test_a_cell_that_takes_too_long_is_a_failure(tmp_path):
    book = notebook(tmp_path / "book.ipynb", "profile = 'digits'", "import time; time.sleep(60)")
    with pytest.raises(NotebookError, match="longer than 1 s"): run_notebook(book, {}, tmp_path / "out.ipynb", timeout=1)
    assert not (tmp_path / "out.ipynb").exists()


def test_the_working_folder_is_the_kits(ddkit, tmp_path):
    """As with `papermill nbs/papers/… out.ipynb` typed at the top of the kit, wherever the notebook lies."""
    book = notebook(tmp_path / "book.ipynb", "profile = 'digits'", "import os; print(os.getcwd())")
    assert ddkit(f"run {book} --out {tmp_path / 'out.ipynb'}")[0] == 0
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0].text.strip() == str(ROOT)
