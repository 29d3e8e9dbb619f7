"""The notebooks: short, readable as text, in step with their outputs, and each runs.

``notebooks/NAME.py`` is the source, ``NAME.ipynb`` is built from it by ``make notebooks``. Each rule returns what
breaks it, and is shown to have power on a notebook that does.
"""

from __future__ import annotations

import ast
import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests.test_architecture import ROOT, Module, draws_from_given_generators

FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
NAMES = {
    "01_blend_two_preferences", "02_why_it_is_not_exact", "03_strength", "04_one_adapter_a_step", "05_solvers",
    "06_stable_diffusion", "07_your_own_members",
}  # fmt: skip
MOST_CELLS, MOST_LINES, MOST_BYTES, SECONDS = 20, 10, 1_000_000, 300
# Folders of one machine; a notebook is read on others.
PLACES = re.compile(r"/(home|root|tmp|work|usr|Users)/|site-packages|[A-Z]:\\\\")

FALSIFIES = re.compile(r"would falsify|would be wrong")

Notebook = Any
Rule = Callable[[Notebook], list[str]]


def code_cells(notebook: Notebook) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: Any) -> list[str]:
    """Return all text that a cell has put out."""
    found = [output.get("text", "") for output in cell.get("outputs", [])]
    return found + [str(output.get("data", {}).get("text/plain", "")) for output in cell.get("outputs", [])]


def has_figure(cell: Any) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def has_few_cells(notebook: Notebook) -> list[str]:
    return [f"{len(notebook.cells)} cells"] if len(notebook.cells) > MOST_CELLS else []


def has_short_functions(notebook: Notebook) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for cell in code_cells(notebook) for node in ast.walk(ast.parse(cell.source))]
    functions = [node for node in nodes if isinstance(node, kinds)]
    return [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > MOST_LINES]


def says_what_would_falsify_each_figure(notebook: Notebook) -> list[str]:
    said, silent = False, []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            said = said or bool(FALSIFIES.search(cell.source))
        elif has_figure(cell):
            silent += [] if said else [cell.source[:60]]
            said = False
    return silent


def is_executed(notebook: Notebook) -> list[str]:
    missing = [cell.source[:60] for cell in code_cells(notebook) if cell.execution_count is None]
    return missing + ([] if any(has_figure(cell) for cell in notebook.cells) else ["no figure"])


def is_quiet(notebook: Notebook) -> list[str]:
    outputs = [output for cell in code_cells(notebook) for output in cell.get("outputs", [])]
    return [
        str(output.get("text", output.get("evalue", "")))[:200]
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def names_no_machine(notebook: Notebook) -> list[str]:
    return [text[:200] for cell in code_cells(notebook) for text in texts(cell) if PLACES.search(text)]


def is_not_the_fast_version(notebook: Notebook) -> list[str]:
    return [text[:60] for cell in code_cells(notebook) for text in texts(cell) if "fast mode" in text]


def draws_explicitly(notebook: Notebook) -> list[str]:
    tree = ast.parse("\n".join(cell.source for cell in code_cells(notebook)))
    return [f"line {line}" for line in draws_from_given_generators(Module(Path("notebooks/some.py"), tree))]


SOURCE_RULES: list[Rule] = [has_few_cells, has_short_functions, draws_explicitly]
BUILT_RULES: list[Rule] = [
    says_what_would_falsify_each_figure, is_executed, is_quiet, names_no_machine, is_not_the_fast_version,
]  # fmt: skip


def made(*cells: tuple[str, str], **output: Any) -> Notebook:
    """Return a notebook of (kind, source) cells; the last one's output may be given."""
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    notebook = nbformat.v4.new_notebook(cells=[make[kind](source) for kind, source in cells])
    if output:
        notebook.cells[-1].outputs = [nbformat.v4.new_output(**output)]
        notebook.cells[-1].execution_count = 1
    return notebook


PICTURE = {"output_type": "display_data", "data": {"image/png": base64.b64encode(b"png").decode()}}
LONG = "def long():\n" + "    x = 1\n" * 10
BREAKS: list[tuple[Rule, Notebook]] = [
    (has_few_cells, made(*[("markdown", "text")] * 21)),
    (has_short_functions, made(("code", LONG))),
    (draws_explicitly, made(("code", "import torch\ntorch.randn(3)"))),
    (says_what_would_falsify_each_figure, made(("markdown", "a figure"), ("code", "draw()"), **PICTURE)),
    (is_executed, made(("code", "1"))),
    (is_quiet, made(("code", "1"), output_type="stream", name="stderr", text="a warning")),
    (is_quiet, made(("code", "1"), output_type="error", ename="ValueError", evalue="wrong", traceback=[])),
    (names_no_machine, made(("code", "1"), output_type="stream", name="stdout", text="see /home/me/x.py")),
    (is_not_the_fast_version, made(("code", "1"), output_type="stream", name="stdout", text="fast mode: rough")),
]


@pytest.mark.parametrize(("rule", "notebook"), BREAKS, ids=lambda value: getattr(value, "__name__", ""))
def test_rule_rejects_what_breaks_it(rule: Rule, notebook: Notebook) -> None:
    assert rule(notebook)


def test_one_sentence_serves_one_figure() -> None:
    first = made(("markdown", "What would falsify it: a gap."), ("code", "draw()"), **PICTURE)
    assert not says_what_would_falsify_each_figure(first)
    first.cells.append(first.cells[-1].copy())
    assert says_what_would_falsify_each_figure(first)


def test_all_notebooks_are_there() -> None:
    assert {source.stem for source in SOURCES} >= NAMES
    assert {built.stem for built in FOLDER.glob("*.ipynb")} == {source.stem for source in SOURCES}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_source_follows_the_rules(source: Path) -> None:
    notebook = jupytext.read(source)
    assert not {rule.__name__: broken for rule in SOURCE_RULES if (broken := rule(notebook))}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_built_notebook_is_the_source_with_outputs(source: Path) -> None:
    path = source.with_suffix(".ipynb")
    assert path.stat().st_size < MOST_BYTES
    built, text = nbformat.read(path, as_version=4), jupytext.read(source)
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (built, text)]
    assert cells[0] == cells[1], "the source has changed: run `make notebooks`"
    assert not {rule.__name__: broken for rule in BUILT_RULES if (broken := rule(built))}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_runs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDEBLEND_FAST", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else it warns about frozen modules
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = jupytext.read(source)
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=folder).execute()
    rules = (is_quiet, names_no_machine, is_executed)
    assert not {rule.__name__: broken for rule in rules if (broken := rule(notebook))}
