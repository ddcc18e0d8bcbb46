"""How many of the digits' cells get another name when a piece of the kit is edited.

Each edit is made in the kit's sources as this process reads them; nothing on disk changes. Printed are the cells of all
tables and figures (with those that they come from) whose key is another one, by kind.

    python bench/renamed_cells.py [PROFILE]
"""

import ast
import sys
from collections import Counter
from contextlib import contextmanager

from ddkit import code, facts, papers
from ddkit.cells import Cell

EDITS = {  # what an author does → (module, function to edit, or source to append)
    "a new recipe": ("recipes_mgd3", "+@register('brand-new')\ndef brand_new(workshop): return workshop.choose('random')\n"),
    "a new clustering": ("modes", "+@register_modes('brand-new')\ndef brand_new(count, seed=0): return kmeans_modes(count, seed)\n"),
    "the recipe of MGD³": ("recipes_mgd3", "mgd3"),
    "the recipe of ManifoldGD": ("recipes_manifoldgd", "manifoldgd"),
    "herding": ("selection", "herding"),
    "k-means": ("modes", "kmeans_modes"),
    "Gaussian mixtures": ("modes", "MixtureModes.fit"),
    "IGD's influence": ("priors", "influence"),
    "DAP's guidance": ("priors", "PriorGuidance._energy"),
    "one step of DDPM": ("sampling", "DDPM.step"),
    "one step of DDIM": ("sampling", "DDIM.step"),
    "inversion matching": ("finetuning", "InversionMatching.__call__"),
    "the random crop": ("augmentations", "crop_boxes"),
    "the horizontal flip": ("augmentations", "flip"),
    "shuffled patches": ("augmentations", "shuffle_patches"),
    "ConvNet-6": ("networks", "ConvNet.forward"),
    "Swin-T": ("networks", "_swint"),
    "the training loop": ("training", "train_networks"),
    "coverage": ("metrics", "coverage"),
    "the embedded generator": ("backbones", "load_embedded"),
    "the original DiT": ("denoisers", "_Attention.forward"),
    "a table": ("tables", "results_table"),
    "the store": ("store", "Store.compute"),
}


def edited_source(source: str, what: str) -> str:
    """The source of a module with a function changed, or with something appended (`+…`)."""
    if what.startswith("+"): return source + "\n\n" + what[1:]
    tree, path = ast.parse(source), what.split(".")
    nodes = tree.body
    for name in path:
        node = next(n for n in nodes if getattr(n, "name", "") == name)
        nodes = node.body
    node.body.insert(0, ast.parse("assert 'edited'").body[0])
    return ast.unparse(tree)


@contextmanager
def edit(module: str, what: str):
    """Within this context the kit's code is read as if it had been edited."""
    read = facts.module_source
    facts.module_source = lambda name: edited_source(read(name), what) if name == f"ddkit.{module}" else read(name)
    code.forget_sources()
    try: yield
    finally:
        facts.module_source = read
        code.forget_sources()


def all_cells(profile: str) -> list[Cell]:
    """The cells of all artefacts and those that they come from, each once."""
    found: dict[str, Cell] = {}
    def visit(cell):
        if cell.key in found: return
        for up in cell.inputs: visit(up)
        found[cell.key] = cell
    for artefact in papers.select():
        for cell in papers.cells(artefact, profile): visit(cell)
    return list(found.values())


def keys_now(cells: list[Cell]) -> list[str]:
    """The keys of the cells, found anew."""
    fresh = {cell: Cell(**{f: getattr(cell, f) for f in cell.__dataclass_fields__}) for cell in cells}
    return [fresh[cell].key for cell in cells]


if __name__ == "__main__":
    cells = all_cells(sys.argv[1] if len(sys.argv) > 1 else "digits")
    before, kinds = keys_now(cells), Counter(cell.kind for cell in cells)
    print(f"{len(cells)} cells: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}\n")
    print(f"{'edited':<26}{'renamed':>16}   by kind")
    for title, (module, what) in EDITS.items():
        with edit(module, what): after = keys_now(cells)
        renamed = Counter(cell.kind for cell, a, b in zip(cells, before, after) if a != b)
        share = f"{renamed.total()} ({100 * renamed.total() / len(cells):.0f} %)"
        print(f"{title:<26}{share:>16}   {', '.join(f'{n} {kind}' for kind, n in renamed.items())}", flush=True)
