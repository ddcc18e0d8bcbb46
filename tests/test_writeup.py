"""The LaTeX of tables and figures: that it is well formed, and where LaTeX is installed that it compiles."""

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from ddkit.figures import figure_style
from ddkit.labels import COLUMN_WIDTH
from ddkit.reports import save_figure, save_table, write_index, write_writeup
from ddkit.tables import results_table

KIT = Path(__file__).parent.parent
MAIN = KIT / "writeup" / "main.tex"
PROVENANCE = {"profiles": {"digits": {"name": "digits"}}, "seeds": [0, 1], "commit": "0" * 40}
# commands of the LaTeX kernel, then of booktabs, multirow, siunitx and graphicx (rotating brings an environment alone)
COMMANDS = set(r"""\begin \end \centering \caption \label \smallskip \small \footnotesize \scriptsize \setlength \tabcolsep \linewidth \multicolumn \underline \textbf \bfseries \mdseries \phantom \rlap \shortstack
    \ifdim \width \textwidth \else \fi \pm \downarrow \uparrow \approx \textsuperscript \textsubscript \ell \lambda \sigma \tau \mu \Delta \times \cdot \leq \geq \rightarrow \surd \textbar \textless \textgreater \textasciitilde
    \toprule \midrule \bottomrule \cmidrule \addlinespace \multirow \sisetup \resizebox""".split())


def runs(methods=("random", "mgd3", "manifoldgd", "manifoldgd-released")) -> pd.DataFrame:
    rows = [{"dataset": "digits", "network": n, "ipc": i, "method": m, "seed": s, "best": 9.5 * i + 3.3 * s + 7 * k} for n in ("convnet6", "resnet18") for i in (1, 10) for k, m in enumerate(methods) for s in (0, 1)]
    return pd.DataFrame(rows).query("not (method == 'random' and ipc == 10 and seed == 1) and not (method == 'mgd3' and ipc == 1 and network == 'resnet18')")


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Path:
    "A kit with three tables (one fits a column, one both, one stands sideways), a narrow figure, and the writeup."
    import matplotlib.pyplot as plt
    root = tmp_path_factory.mktemp("kit")
    stated = pd.DataFrame({"dataset": "imagewoof", "network": "convnet6", "ipc": 10, "method": ["dm", "mgd3", "full"], "mean": [26.9, 35.1, 86.4], "std": [1.2, None, 0.2]})
    many = tuple("abcdefghijkl") + ("manifoldgd-released",)
    tables = [results_table(runs().query("network == 'convnet6'"), ["method"], ["ipc"], "best"),
              results_table(runs(), ["method"], ["network", "ipc"], "best", reported=stated, compare=("manifoldgd", "mgd3")),
              results_table(runs(many), ["ipc", "network"], ["method"], "best", reported=stated, compare=[("a", "b")])]
    for i, table in enumerate(tables, 1): save_table(table, root / f"tables/digits/manifoldgd/table{i}", PROVENANCE, "50% of r_t & {x} # MGD³: ℓ₂ ≤ 3.")
    with figure_style(COLUMN_WIDTH):
        fig, axis = plt.subplots()
        axis.plot([0, 1], [2, 3])
    save_figure(fig, root / "figures/digits/manifoldgd/fig4", PROVENANCE, "A line. n = 2 seeds.")
    plt.close(fig)
    write_writeup(root, "digits")
    shutil.copy(MAIN, root / "writeup")
    return root


def texts(*roots: Path) -> list[Path]: return [path for root in roots for path in sorted((root / "tables").glob("*/**/*.tex"))]


def body(path: Path) -> str: return "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("%"))


def columns(row: str) -> int:
    "How many columns a row fills."
    row = re.sub(r"\\.", lambda m: "  " if m.group()[1] in "&{}%" else m.group(), row)
    depth, cells = 0, [""]
    for character in row:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "&" and not depth: cells.append("")
        else: cells[-1] += character
    return sum(int(span.group(1)) if (span := re.match(r"\s*\\multicolumn\{(\d+)\}", cell)) else 1 for cell in cells)


def test_tables_are_well_formed(kit):
    for path in texts(kit, KIT):
        tex = body(path)
        bare = re.sub(r"\\[{}]", "", tex)
        depths = [bare[:i].count("{") - bare[:i].count("}") for i in range(len(bare) + 1)]
        assert min(depths) == depths[-1] == 0, path
        unknown = set(re.findall(r"\\[A-Za-z]+", tex.replace("\\\\", " "))) - COMMANDS  # a line break is no command
        assert tex.count("\\begin{") == tex.count("\\end{") and not unknown, (path, unknown)


def test_every_row_fills_the_layout(kit):
    for path in texts(kit, KIT):
        layout = re.search(r"\\begin\{tabular\}\{(.*)\}$", body(path), re.M).group(1)
        while (plain := re.sub(r"\{[^{}]*\}", "", layout)) != layout: layout = plain
        wanted = len(re.sub(r"\[[^]]*\]|\s", "", layout))
        rows = [line.removesuffix(r" \\") for line in body(path).splitlines() if line.endswith(r" \\")]
        assert rows and {columns(row) for row in rows} == {wanted}, path


def test_a_table_names_its_packages(kit):
    needs = [path.read_text().splitlines()[0] for path in texts(kit)]
    assert needs == [r"% needs \usepackage{booktabs,multirow,siunitx}"] * 2 + [r"% needs \usepackage{booktabs,multirow,siunitx,graphicx,rotating}"]
    for path, line in zip(texts(kit), needs): assert (r"\resizebox" in body(path)) == ("graphicx" in line) and ("{sidewaystable*}" in body(path)) == ("rotating" in line)


def test_captions_name_the_profile(kit):
    for path in [*texts(kit), kit / "figures/digits/manifoldgd/fig4.caption.tex"]: assert re.search(r"\\caption\{.* Profile digits\.\}", body(path)), path


def test_the_indices_list_every_artefact(kit):
    tables, figures = write_index(kit, {"manifoldgd/table1": "table1", "manifoldgd/fig4": "fig4"})
    assert re.findall(r"^#### (.*)", tables.read_text(), re.M) == ["table1", "table2", "table3"] and "--paper manifoldgd --only fig4 --profile digits" in figures.read_text()
    assert (kit / "writeup/artefacts-digits.tex").read_text().count(r"\input") == 4


def latex() -> str:
    "The LaTeX engine, or skip."
    engine = next((name for name in ("pdflatex", "latexmk", "tectonic") if shutil.which(name)), None)
    if engine is None: pytest.skip("no LaTeX here: none of pdflatex, latexmk, tectonic is installed")
    if engine != "tectonic" and shutil.which("kpsewhich"):
        for package in ("booktabs", "multirow", "siunitx", "graphicx", "rotating"):
            if not subprocess.run(["kpsewhich", f"{package}.sty"], capture_output=True).stdout: pytest.skip(f"this LaTeX has no package {package} (Debian: texlive-latex-extra, texlive-science)")
    return engine


def compiled(folder: Path, main: str) -> str:
    "The log of a document that must compile."
    engine = latex()
    command = {"pdflatex": ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", main], "latexmk": ["latexmk", "-pdf", "-interaction=nonstopmode", "-halt-on-error", main], "tectonic": ["tectonic", "--keep-logs", main]}[engine]
    for _ in range(2 if engine == "pdflatex" else 1):
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    return (folder / main).with_suffix(".log").read_text(errors="replace")


def assert_fits(log: str):
    wide = [line for line in log.splitlines() if (points := re.search(r"Overfull \\hbox \(([\d.]+)pt", line)) and float(points.group(1)) > 3]
    assert not wide and "Float too large" not in log and "undefined references" not in log, wide


def test_each_table_compiles_with_the_packages_it_names(kit):
    for path in texts(kit):
        document = path.with_name(f"alone-{path.stem}.tex")
        needs = path.read_text().splitlines()[0].removeprefix("% needs ")
        document.write_text("\\documentclass[twocolumn]{article}\n\\usepackage[margin=0.875in]{geometry}\\setlength{\\columnsep}{0.25in}\n" + f"{needs}\n\\begin{{document}}\n\\input{{{path.name}}}\n\\end{{document}}\n")
        try: assert_fits(compiled(path.parent, document.name))
        finally: document.unlink()


def test_the_writeup_compiles(kit): assert_fits(compiled(kit / "writeup", MAIN.name))


def test_the_writeup_of_the_committed_artefacts_compiles(tmp_path):
    latex()
    for name in ("tables", "figures"): shutil.copytree(KIT / name, tmp_path / name)
    (tmp_path / "writeup").mkdir()
    shutil.copy(MAIN, tmp_path / "writeup")
    write_writeup(tmp_path, "digits")
    assert_fits(compiled(tmp_path / "writeup", MAIN.name))
