"""README.md from nbs/index.ipynb: its markdown and its stored outputs, with paths as seen from the top folder.

`python workflow/readme.py` writes README.md; `--check` exits with 1 if README.md is not what the notebook gives.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import RegexRemovePreprocessor, TagRemovePreprocessor
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent


def readme_text() -> str:
    "The README that nbs/index.ipynb stands for. Cells tagged `hide-input` show their output only."
    config = Config()
    config.TagRemovePreprocessor.remove_input_tags = {"hide-input"}
    config.TagRemovePreprocessor.remove_cell_tags = {"hide"}
    exporter = MarkdownExporter(config=config, preprocessors=[TagRemovePreprocessor(config=config, enabled=True), RegexRemovePreprocessor])
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}  # nbdev-clean drops it; it names the language of the code blocks
    body, resources = exporter.from_notebook_node(notebook)
    if resources["outputs"]:
        raise SystemExit("nbs/index.ipynb: show pictures as files under figures/, not as cell outputs; a README cannot hold them")
    body = re.sub(r"\]\(\.\./", "](", body)
    body = re.sub(r"\]\((?!http|#|figures/|tables/|nbs/)([\w./-]+\.ipynb)", r"](nbs/\1", body)
    return "<!-- made from nbs/index.ipynb by workflow/readme.py; edit the notebook -->\n\n" + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def main() -> int:
    file, text = ROOT / "README.md", readme_text()
    if "--check" in sys.argv:
        return 0 if file.is_file() and file.read_text(encoding="utf-8") == text else 1
    file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
