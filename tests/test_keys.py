"""What a cell's key depends on: all the code that computing it enters, all the values that it reads, and nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ddkit
from ddkit import cells, code, facts
from ddkit.cells import Cell, code_of, kind_of
from ddkit.facts import Bare
from ddkit.profiles import HOW, Profile, load_profile
from ddkit.store import Store
from ddkit.work import distill_cell, encode_cell, evaluate_cell, features_cell, finetune_cell, measure_cell

SMOKE = load_profile("smoke")
KIT = Path(ddkit.__file__).resolve().parent
# what finds names, keeps cells and hands results over decides none of them
MACHINERY = {"registry", "plugins", "facts", "code", "files", "fingerprints", "cells", "store"}

FEW = [  # every kind
    encode_cell(SMOKE), finetune_cell(SMOKE, "surrogate"), *(distill_cell(SMOKE, method, 2) for method in ("random", "manifoldgd", "mgd3 + dap")),
    evaluate_cell(SMOKE, "random", 2, 0, "convnet6"), evaluate_cell(SMOKE, "random", 2, 0, "resnetap10", "soft"), features_cell(SMOKE, "mgd3", 2),
    measure_cell(SMOKE, "mgd3", 2),
]
MORE = [  # methods, networks and protocols that take different ways
    *(finetune_cell(SMOKE, name) for name in ("minimax", "im-released", "inversion")),
    *(distill_cell(SMOKE, method, 2) for method in ("herding", "dit", "mgd3", "manifoldgd-released", "minimax", "ims3", "d4m", "d3hr", "cao2", "igd")),
    distill_cell(SMOKE.replace(sampler="ddim"), "mgd3", 2), distill_cell(SMOKE, "mgd3", 2, modes="gmm"),
    evaluate_cell(SMOKE, "full", 0, 0, "resnet18"), evaluate_cell(SMOKE, "random", 2, 0, "vit"),
    evaluate_cell(SMOKE, "random", 2, 0, "convnet6", "soft-sre2l"), evaluate_cell(SMOKE, "random", 2, 0, "convnet6", "hard-d3hr"),
    evaluate_cell(SMOKE, "random", 2, 0, "convnet6", "hard-ims3"),
    features_cell(SMOKE, "full", extractor="denoiser"), features_cell(SMOKE, "mgd3", 2, extractor="denoiser"),
]
REPRESENTATIVES = [*FEW, *(pytest.param(cell, marks=pytest.mark.slow) for cell in MORE)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("keys") / "runs")


def entered_by(act) -> set[str]:
    """Qualified names of the kit's functions (methods with their class, what is nested with what it is nested in) that `act` enters."""
    entered = set()

    def note(frame, event, _):
        if event != "call" or not frame.f_code.co_filename.startswith(str(KIT)): return
        if frame.f_code.co_name.endswith(("comp>", "genexpr>")): return  # part of a function that was entered
        if Path(frame.f_back.f_code.co_filename) == KIT / "code.py": return  # it is finding names
        module, name = Path(frame.f_code.co_filename).stem, frame.f_code.co_qualname.split(".<locals>")[0]
        if module not in MACHINERY and not name.startswith("<"): entered.add(f"ddkit.{module}.{name}")

    sys.setprofile(note)
    try: act()
    finally: sys.setprofile(None)
    return entered


def compute(cell: Cell, store: Store, folder: Path) -> None:
    """Compute a cell as the store does, without keeping it, and with nothing shared from before."""
    folder.mkdir()
    fresh = Store(store.root)
    with cells.plugins_of(cell.profile): kind_of(cell).compute(cell, fresh.session, folder)


DISPLAY = ("__repr__", "__str__", "_repr_markdown_", "__init_subclass__")


@pytest.mark.parametrize("cell", REPRESENTATIVES, ids=str)
def test_all_code_that_is_entered_is_in_the_key(cell, store, tmp_path):
    """The text of every function that is entered is one of those that the key is a hash of, and no other function has the same text."""
    found = code_of(cell)  # first: naming a cell enters functions too
    before = cell.key
    for up in cell.inputs: store.compute(up)
    entered = {name for name in entered_by(lambda: compute(cell, store, tmp_path / "payload")) if name.rsplit(".")[-1] not in DISPLAY}
    assert len(entered) > 5 and entered <= set(found.definitions), sorted(entered - set(found.definitions))
    for name in sorted(entered): assert texts_of(name) <= set(found.texts), name
    some = sorted(entered)[len(str(cell)) % len(entered)]
    assert key_with_an_edit(cell, some) != before, some


@pytest.mark.slow
@pytest.mark.parametrize("cell", [*FEW, *MORE], ids=str)
def test_an_edit_of_any_function_that_is_entered_changes_the_key(cell, store, tmp_path):
    before = cell.key
    for up in cell.inputs: store.compute(up)
    for name in sorted(entered_by(lambda: compute(cell, store, tmp_path / "payload"))):
        if name.rsplit(".")[-1] not in DISPLAY: assert key_with_an_edit(cell, name) != before, name


def texts_of(name: str) -> set[str]:
    """The bare code of a function of the kit, a method's with its class."""
    module, *path = name.removeprefix("ddkit.").split(".")
    definition = code.Definition(f"ddkit.{module}", ".".join(path))
    found = facts.definition_facts(definition, code._registered_names().get(definition, frozenset()))
    return {f"{'.'.join(path[:-1])} {piece.text}".strip() for piece in found}


def with_a_statement(source: str, name: str) -> str:
    """The source of a module with a statement put into one of its functions."""
    tree = ast.parse(source)
    nodes = tree.body
    for part in name.split("."):
        wanted = [node for node in nodes if getattr(node, "name", "") == part]
        nodes = [child for node in wanted for child in node.body]
    for node in wanted: node.body.insert(1 if ast.get_docstring(node) else 0, ast.parse("assert 'edited'").body[0])
    return ast.unparse(tree)


def key_with_an_edit(cell: Cell, name: str) -> str:
    """The key that the cell would have if a function were edited."""
    _, module, function = name.split(".", 2)
    read = facts.module_source
    facts.module_source = lambda asked: with_a_statement(read(asked), function) if asked == f"ddkit.{module}" else read(asked)
    code.forget_sources()
    try: return Cell(**{f: getattr(cell, f) for f in cell.__dataclass_fields__}).key
    finally:
        facts.module_source = read
        code.forget_sources()


class Recorded(Profile):
    """A profile that notes which of its fields are read."""

    seen: set = set()

    def __getattribute__(self, name):
        if name in Profile.__dataclass_fields__: Recorded.seen.add(name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("cell", REPRESENTATIVES, ids=str)
def test_all_values_that_are_read_are_in_the_key(cell, store, tmp_path, monkeypatch):
    for up in cell.inputs: store.compute(up)
    watched = Recorded(**{f: getattr(cell.profile, f) for f in Profile.__dataclass_fields__})
    recorded = Cell(**{f: getattr(cell, f) for f in cell.__dataclass_fields__ if f != "profile"}, profile=watched)
    known = set(cell.identity["profile"])
    monkeypatch.setattr("ddkit.store.depends_on", lambda make, profile: (make, "once"))  # it looks at fields to know what may be shared
    monkeypatch.setattr("ddkit.methods.set_manifest", manifest := lambda make, recipes, workshop: {"method": "", "ipc": 2, "seed": 0, "classes": [
        {"label": i, "folder": f, "name": c} for i, (f, c) in enumerate(zip(workshop.data.folders, workshop.data.classes))]})
    monkeypatch.setattr("ddkit.work.set_manifest", manifest)
    object.__setattr__(recorded, "__dict__", {**recorded.__dict__, "values": cell.values, "inputs": cell.inputs, "identity": cell.identity, "key": cell.key})
    Recorded.seen = set()
    compute(recorded, store, tmp_path / "payload")
    read = Recorded.seen - HOW - {"options"}
    assert read <= known, sorted(read - known)


def test_what_says_how_changes_no_key():
    cell = distill_cell(SMOKE, "mgd3", 2)
    for name, value in {"batch_size": 7, "device": "auto", "memory_format": "channels-last", "seeds_together": 2, "name": "other", "cache": "elsewhere"}.items():
        assert name in HOW
        profile = Profile(**{**{f: getattr(SMOKE, f) for f in Profile.__dataclass_fields__}, name: value})
        assert Cell("distill", profile, "mgd3", 2).key == cell.key, name


def test_keys_do_not_depend_on_what_other_profiles_loaded(tmp_path):
    """A plugin's metric counts for its own profile; another profile's keys stay as they are, before and after it was loaded."""
    before = measure_cell(SMOKE, "mgd3", 2).key
    plugin = tmp_path / "plugin.py"
    plugin.write_text("from ddkit.metrics import register_metric\n@register_metric('higher')\ndef mine(synthetic): return 1.0\n")
    own = measure_cell(SMOKE.replace(plugins=(str(plugin),)), "mgd3", 2)
    assert "mine" in own.values["metrics"]["judge"] and own.key != before
    assert Cell("measure", SMOKE, "mgd3", 2, network=" ".join(SMOKE.features)).key == before


@pytest.mark.parametrize("register", ["from ddkit.modes import register_modes as register", "from ddkit.methods import register", "from ddkit.metrics import register_metric as register"])
def test_a_plugin_cannot_replace_what_is_there(register, tmp_path):
    name = {"modes": "kmeans", "methods": "mgd3", "metrics": "coverage"}[register.split()[1].split(".")[1]]
    call = "register('higher', name='coverage')" if name == "coverage" else f"register({name!r})"
    plugin = tmp_path / "plugin.py"
    plugin.write_text(f"{register}\n@{call}\ndef mine(synthetic): return 0\n")
    with pytest.raises(ValueError, match="exists already"): distill_cell(SMOKE.replace(plugins=(str(plugin),)), "mgd3", 2)


def test_a_plugin_counts_as_a_whole_with_what_it_imports(tmp_path, monkeypatch):
    """A user's file may compose names and fill tables in ways that no walk sees: all of it counts, but for comments."""
    monkeypatch.syspath_prepend(tmp_path)
    text = ("from ddkit.methods import register\nfrom {sibling} import *\ndef make(count):\n    def mine(workshop): return helper(workshop, count)\n    return mine\n"
            "register('mine')(make(3))\ndef helper(workshop, count): return workshop.choose('random')  # {comment}\n")

    def key(name, text, sibling="COUNT = 1\n"):
        (tmp_path / f"sibling_{name}.py").write_text(sibling)
        (tmp_path / f"{name}.py").write_text(text.replace("{sibling}", f"sibling_{name}"))
        found = distill_cell(SMOKE.replace(plugins=(str(tmp_path / f"{name}.py"),)), "mine", 2).identity
        return found["code"]

    same = key("a", text), key("b", text.replace("{comment}", "another comment"))
    # the import says another name
    assert same[0] != same[1] and key("c", text.replace("'random'", "'herding'")) not in same
    code.forget_sources()
    assert key("a", text.replace("{comment}", "yet another")) == same[0]
    code.forget_sources()

    def in_a_new_process():
        code.forget_sources()
        for name in list(sys.modules):
            if name.startswith("ddkit_plugin_a_") or name == "sibling_a": del sys.modules[name]

    for what, sibling in ((text.replace("make(3)", "make(4)"), "COUNT = 1\n"), (text, "COUNT = 2\n")):
        in_a_new_process()
        assert key("a", text) == same[0]
        with pytest.raises(ValueError, match="plugin .*a.py' of profile 'smoke' was edited after it was imported"):
            key("a", what, sibling)
        in_a_new_process()
        assert key("a", what, sibling) != same[0]


def test_what_pip_put_into_a_folder_is_installed_and_what_lies_beside_it_is_not(tmp_path, monkeypatch):
    """As by `pip install --target`: the records of its distributions tell."""
    (tmp_path / "vendored").mkdir()
    (tmp_path / "vendored/__init__.py").write_text("from .parts import part\n")
    (tmp_path / "vendored/parts.py").write_text("def part(): return 1\n")
    (tmp_path / "beside.py").write_text("from vendored import part\n\n\ndef mine(): return part()\n")
    (tmp_path / "vendored-1.0.dist-info").mkdir()
    (tmp_path / "vendored-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: vendored\nVersion: 1.0\n")
    (tmp_path / "vendored-1.0.dist-info/RECORD").write_text("vendored/__init__.py,,\nvendored/parts.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert facts.is_users("beside") and not facts.is_users("vendored") and not facts.is_users("vendored.parts")
    for name in ("beside", "vendored", "vendored.parts"): monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_package_that_does_not_say_where_it_lies_is_asked_by_its_spec(tmp_path, monkeypatch):
    """As those whose modules come on first use, which stand in for themselves in `sys.modules`."""
    (tmp_path / "lazily").mkdir()
    (tmp_path / "lazily/__init__.py").write_text("from .parts import part\n")
    (tmp_path / "lazily/parts.py").write_text("def part(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("lazily")
    module.__package__ = None
    assert facts.absolute(".parts", "lazily") == "lazily.parts"
    assert facts.ModuleCode("lazily").imported == {"part": ("lazily.parts", "part")}
    for name in ("lazily", "lazily.parts"): monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("generator, network", [("stable-diffusion", "PromptedUNet"), ("latent-diffusion", "LabelledUNet")])
def test_methods_that_a_library_calls_back_count(generator, network):
    """`forward` of a class whose grandparent is PyTorch's, and of a user's network on top of one of the kit's."""
    cell = distill_cell(SMOKE.replace(generator=generator, weights="weights"), "dit", 2)
    assert f"ddkit.denoisers.{network}.forward" in code_of(cell).definitions
    assert key_with_an_edit(cell, f"ddkit.denoisers.{network}.forward") != cell.key


def test_what_ships_with_the_kit_counts_by_content(monkeypatch):
    cell = distill_cell(SMOKE, "dit", 2)
    assert {"embedded_dit.safetensors", "embedded_vae.safetensors"} <= set(cell.identity["assets"])
    monkeypatch.setattr("ddkit.cells.weights_digest", lambda path: "other weights")
    assert distill_cell(SMOKE, "dit", 2).key != cell.key
    assert "class_lists.csv" in distill_cell(SMOKE.replace(dataset="imagefolder", classes="imagewoof", generator="dit"), "dit", 2).identity["assets"]


def test_a_library_under_the_same_alias_is_other_code(monkeypatch):
    before, read = distill_cell(SMOKE, "mgd3", 2).key, facts.module_source
    monkeypatch.setattr(facts, "module_source", lambda name: read(name).replace("import torch.nn.functional as F", "import torch as F"))
    code.forget_sources()
    try: assert distill_cell(SMOKE, "mgd3", 2).key != before
    finally:
        monkeypatch.undo()
        code.forget_sources()


def test_options_that_name_registered_things_count_with_their_code():
    """A protocol's line that names an augmentation opens its door, for whoever trains by that protocol."""
    cell = finetune_cell(SMOKE.replace(**{"hard.augmentations.convnet6": ("crop", "randaugment")}), "surrogate")
    assert ("augmentation", "randaugment") in code_of(cell).entries


def test_weights_count_by_content(tmp_path):
    def key(path, content):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return distill_cell(SMOKE.replace(generator="dit", weights=str(path)), "dit", 2).key

    first = key(tmp_path / "a" / "dit.pt", b"weights")
    assert key(tmp_path / "b" / "other.pt", b"weights") == first
    assert key(tmp_path / "a" / "dit.pt", b"WEIGHTS") != first


def test_a_set_has_the_same_manifest_whoever_asks_first(tmp_path):
    one, other = Store(tmp_path / "one"), Store(tmp_path / "other")
    cell = distill_cell(SMOKE, "random", 2)
    stranger = distill_cell(SMOKE.replace(seeds=(5, 6), epochs=7, networks=("vit",), batch_size=3), "random", 2)
    assert cell.key == stranger.key
    one.compute(cell), other.compute(stranger)
    files = [sorted((p.relative_to(s.path(cell)).as_posix(), p.read_bytes()) for p in s.path(cell).rglob("*") if p.is_file() and p.name != "cell.json") for s in (one, other)]
    assert files[0] == files[1]


def test_keys_are_the_same_in_another_process():
    call = "from ddkit.profiles import load_profile; from ddkit.work import *; p = load_profile('smoke'); print(distill_cell(p, 'mgd3 + dap', 2).key, measure_cell(p, 'igd', 2).key)"
    told = {subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True, env={"PATH": "", "PYTHONHASHSEED": seed, "HOME": "."}).stdout for seed in "12"}
    assert told == {f"{distill_cell(SMOKE, 'mgd3 + dap', 2).key} {measure_cell(SMOKE, 'igd', 2).key}\n"}


def test_no_module_lists_what_names_a_result():
    """Names of modules, functions and fields decide no key: the rooms that make keys hold no list of them."""
    trees = {path.stem: Bare().visit(ast.parse(path.read_text())) for path in KIT.glob("*.py")}  # without `__all__`
    functions = {n.name for tree in trees.values() for n in tree.body if isinstance(n, ast.FunctionDef)}
    fields = set(Profile.__dataclass_fields__) - {"options"}
    for room in ("facts", "code", "cells"):
        said = {n.value for n in ast.walk(trees[room]) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not said & ((functions | fields | set(trees)) - {"__init__", "register", "code"}), room  # words of Python, and of a record
