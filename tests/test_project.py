"""The project's own promises: one set of versions, notebooks and library in step, modules that import downwards only."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def module_of(notebook: Path) -> str:
    return notebook.stem[3:]


def pinned() -> dict[str, Version]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {name.lower().replace("_", "-"): Version(version) for name, version in (line.split("==") for line in lines if line)}


def required() -> list[Requirement]:
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group]
    return [Requirement(r) for r in PROJECT["dependencies"] + extras]


@pytest.mark.parametrize("requirement", required(), ids=str)
def test_every_requirement_is_pinned_to_a_version_it_allows(requirement):
    assert requirement.specifier.contains(pinned()[requirement.name.lower()])


def test_torch_is_pinned_while_the_package_allows_older_ones():
    torch = next(r for r in required() if r.name == "torch")
    assert pinned()["torch"] == Version("2.13.0") and torch.specifier.contains("2.4.0")


def test_conda_environment_installs_this_package_at_the_pinned_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["-c constraints.txt", "-e .[dev]"] and "dev" in PROJECT["optional-dependencies"]
    (python,) = [d for d in environment["dependencies"] if str(d).startswith("python=")]
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains(python.split("=")[1])


def test_library_is_what_the_notebooks_export(tmp_path):
    """Export into a copy and compare: an edited .py that was not carried back, or a notebook not exported, shows here."""
    import shutil

    copy = tmp_path / "kit"
    copy.mkdir()
    for name in ("nbs", "ddkit"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    subprocess.run([Path(sys.executable).parent / "nbdev-export"], cwd=copy, check=True, capture_output=True)
    for notebook in LIBRARY:
        file = f"ddkit/{module_of(notebook)}.py"
        assert (copy / file).read_text() == (ROOT / file).read_text(), f"{file} and {notebook.name} differ; run `make notebooks`"


FLOORS = {module_of(p): int(p.stem[:2]) for p in LIBRARY}


def kit_imports(source: str) -> list[tuple[str, ast.stmt]]:
    """The kit's modules that a module imports, absolutely or relatively, anywhere in it, with the statement."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level: names = [f"ddkit.{node.module}"] if node.module else [f"ddkit.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom): names = [f"ddkit.{alias.name}" for alias in node.names] if node.module == "ddkit" else [node.module]
        else: continue
        found += [(name.split(".")[1], node) for name in names if name.startswith("ddkit.")]
    return found


def upward(source: str, module: str) -> list[str]:
    """What a module imports from its own floor or above."""
    return [name for name, _ in kit_imports(source) if name in FLOORS and FLOORS[name] >= FLOORS[module]]


@pytest.mark.parametrize("module", FLOORS)
def test_modules_import_from_lower_floors_only(module):
    source = (ROOT / "ddkit" / f"{module}.py").read_text()
    assert not upward(source, module)
    for forbidden in ("from .cli import main", "from . import cli", "import ddkit.cli", "from ddkit.cli import main", "from ddkit import cli",
                      "def f():\n    from .cli import main"):
        assert upward(f"{source}\n{forbidden}\n", module) == ["cli"], f"{forbidden!r} would pass"


# the command line answers `--help` at once: it imports what a command needs when the command runs
LAZY = {"cli", "listings"}


@pytest.mark.parametrize("module", [m for m in FLOORS if m not in LAZY])
def test_imports_of_the_kit_stand_at_the_top(module):
    source = (ROOT / "ddkit" / f"{module}.py").read_text()
    assert all(node.col_offset == 0 for _, node in kit_imports(source))


@pytest.mark.parametrize("module", FLOORS)
def test_no_private_names_cross_a_wall(module):
    for name, node in kit_imports((ROOT / "ddkit" / f"{module}.py").read_text()):
        assert not any(alias.name.startswith("_") for alias in node.names), f"{module} takes a private name from {name}"


@pytest.mark.parametrize("module", FLOORS)
def test_rooms_are_small_and_lines_short(module):
    lines = (ROOT / "ddkit" / f"{module}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 600, f"{len(lines)} lines: does the room hold one idea?"
    long = [f"{i}: {line[:60]}…" for i, line in enumerate(lines, 1) if len(line) > 120 and not line.startswith("__all__")]
    assert not long


@pytest.mark.parametrize("module", [module_of(n) for n in LIBRARY])
def test_rooms_define_and_register_and_do_nothing_else(module):
    """The walk that names results reads definitions; a room that changed another's things on the way would go unseen."""
    for node in ast.parse((ROOT / "ddkit" / f"{module}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assert all(isinstance(target, (ast.Name, ast.Tuple)) for target in targets), ast.unparse(node)
        elif isinstance(node, (ast.Expr, ast.For)):
            called = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
            names = {getattr(function, "id", getattr(function, "attr", "")) for function in called} - {""}
            assert names <= {"register_sum", "artefact", "add"}, ast.unparse(node)
        else: assert isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)), ast.unparse(node)


def test_no_two_rooms_share_a_floor():
    assert len(set(FLOORS.values())) == len(FLOORS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean(notebook):
    nb = nbformat.read(notebook, as_version=4)
    text = notebook.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|Users|work)/", text), "a path of somebody's machine"
    assert set(nb.metadata) <= {"kernelspec", "language_info"}, "notebook metadata, such as the state of progress bars"
    for cell in nb.cells:
        assert set(cell.metadata) <= {"tags"}, "cell metadata; run nbdev-clean"
        assert not any(o.output_type == "error" for o in cell.get("outputs", [])), "a stored error"
        assert not any("stderr" == o.get("name") for o in cell.get("outputs", [])), "stored warnings"


@pytest.mark.parametrize("notebook", sorted((ROOT / "nbs/papers").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_paper_notebooks_have_a_parameters_cell(notebook):
    nb = nbformat.read(notebook, as_version=4)
    (cell,) = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    assert "profile" in [t.id for node in ast.parse(cell.source).body if isinstance(node, ast.Assign) for t in node.targets]


def test_readme_is_what_the_index_notebook_says():
    done = subprocess.run([sys.executable, ROOT / "workflow/readme.py", "--check"])
    assert done.returncode == 0, "README.md and nbs/index.ipynb differ; run `make readme`"


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_embedded_weights_are_small_enough_to_ship():
    assert sum(p.stat().st_size for p in (ROOT / "ddkit/assets").glob("embedded_*")) <= 6e6
