"""Every library notebook runs, and shows what its cells give: saved outputs are compared with those of a fresh execution."""
import math
import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from levit_study.pipeline import _same_python

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path.name for path in (ROOT / "nbs").glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")
PASSING = re.compile(r"0x[0-9a-f]+|/tmp/[\w./-]+")   # addresses and temporary folders


def skipped(cell):
    return cell.cell_type != "code" or re.search(r"^#\|\s*(eval:\s*false|slow)", cell.source, re.M)


def words(cell):
    "A cell's text outputs as one text, and whether it drew"
    texts, drew = [], False
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if any(mime.startswith("image/") or mime == "text/html" for mime in data): drew = True
        elif output.output_type == "stream": texts.append(output.text if output.name == "stdout" else "")
        else: texts.append(data.get("text/plain", "") + "\n")
    return PASSING.sub("…", "".join(texts)).strip(), drew


def alike(saved, fresh):
    "Whether two texts say the same; numbers may differ by a thousandth, as processors do"
    if NUMBER.sub("#", saved).split() != NUMBER.sub("#", fresh).split(): return False
    pairs = zip(NUMBER.findall(saved), NUMBER.findall(fresh), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=1e-3, abs_tol=1e-3) for a, b in pairs)


def execute(name):
    "Run one notebook; return what is wrong, empty if nothing is"
    os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore:IProgress not found")
    saved = nbformat.read(ROOT / "nbs" / name, 4)
    fresh = nbformat.v4.new_notebook(cells=[nbformat.from_dict(cell) for cell in saved.cells if not skipped(cell)], metadata=saved.metadata)
    client = NotebookClient(fresh, timeout=1200, kernel_manager_class=_same_python(), resources={"metadata": {"path": str(ROOT / "nbs")}})
    before = [(cell.source, words(cell)) for cell in fresh.cells]
    try: client.execute()
    except CellExecutionError as error: return f"{name}: {error}"
    for cell, (source, (text, drew)) in zip(fresh.cells, before, strict=True):
        now, draws = words(cell)
        if drew != draws: return f"{name}: shows {'a picture' if drew else 'no picture'}, gives {'one' if draws else 'none'}:\n{source}"
        if not alike(text, now): return f"{name}: shows\n{text}\nbut gives\n{now}\nin\n{source}"
    return ""


@pytest.fixture(scope="module")
def results():
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield dict(zip(NOTEBOOKS, pool.map(execute, NOTEBOOKS), strict=True))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_shows_what_it_gives(results, name):
    assert results[name] == ""


def test_a_stale_output_is_noticed():
    assert alike("Dice 0.81234\n", "Dice 0.81235 ") and not alike("Dice 0.8", "Dice 0.9") and not alike("Dice 0.8", "Jaccard 0.8") and not alike("", "1")


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda path: path.stem)
def test_no_output_tells_where_it_was_made(path):
    outputs = [cell.get("outputs", []) for cell in nbformat.read(path, 4).cells]
    assert not re.search(r"site-packages|/home/|/root/|" + re.escape(str(ROOT)), str(outputs))
