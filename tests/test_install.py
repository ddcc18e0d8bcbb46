"""The kit as a package: built from a copy of the checkout, installed beside nothing, used from an empty folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed package, without its dependencies."""
    folder = tmp_path_factory.mktemp("install")
    source, wheels, site = folder / "source", folder / "wheels", folder / "site"
    shutil.copytree(ROOT / "ddkit", source / "ddkit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    for command in (["wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], ["install", "--no-deps", "--target", site, "--find-links", wheels, "--no-index", "ddkit"]):
        done = subprocess.run([*pip, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return site


@pytest.fixture
def ddkit(site, tmp_path):
    """Run a command of the installed package in an empty folder: it comes before the checkout, wherever that is known."""
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "DDKIT_RUNS"} | {"PYTHONPATH": str(site)}

    def run(*arguments, code="from ddkit.cli import main; main()", cwd=folder):
        return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)

    run.folder = folder
    return run


def test_it_is_the_package_that_runs(ddkit, site):
    told = ddkit(code="import ddkit.profiles; print(ddkit.__file__, ddkit.profiles.KIT, ddkit.profiles.find_settings(), sep='\\n')")
    assert told.stdout.splitlines() == [str(site / "ddkit/__init__.py"), str(site), str(site / "ddkit/assets/settings.ini")]


def test_distilling_in_an_empty_folder(ddkit):
    done = ddkit("distill", "manifoldgd", "--ipc", "2", "--out", "X", "--set", "steps=8", "--set", "manifoldgd.stop=4")
    assert done.returncode == 0 and done.stdout == "20 images in X\n", done.stderr
    assert len(list((ddkit.folder / "X").rglob("*.png"))) == 20
    assert sorted(p.name for p in ddkit.folder.iterdir()) == ["X", "runs"]


def test_profiles_and_checks(ddkit):
    assert "imagewoof" in ddkit("profiles").stdout
    done = ddkit("check", "digits")
    assert done.returncode == 0 and "MISSING" not in done.stdout and "WRONG" not in done.stdout, done.stdout + done.stderr


def test_a_project_of_ones_own(ddkit):
    assert ddkit("init", "mine").returncode == 0
    shown = ddkit("methods", "typical", "--profile", "mine", cwd=ddkit.folder / "mine")
    assert "typical.power of profile mine" in shown.stdout, shown.stderr  # the plugin is the first to import the kit's methods
    done = ddkit("distill", "typical", "--profile", "mine", "--ipc", "1", "--out", "X", cwd=ddkit.folder / "mine")
    assert done.returncode == 0 and done.stdout == "10 images in X\n", done.stderr


def test_reproducing_wants_the_checkout(ddkit):
    done = ddkit("reproduce", "--only", "fig4")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "which the package does not contain; clone the kit" in done.stderr
    assert not list(ddkit.folder.iterdir())
