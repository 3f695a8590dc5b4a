"""Every library notebook runs, and shows what its cells give: saved outputs are compared with those of a fresh execution."""
import math
import os
import re
import signal
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import nbformat
import pytest

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
        pictured = any(mime.startswith("image/") for mime in data)
        if pictured or "text/html" in data: drew = True
        if output["output_type"] == "stream": texts += output["text"] if output["name"] == "stdout" else ""
        elif not pictured: texts += [*data.get("text/markdown", data.get("text/plain", "")), "\n"]   # a table's numbers, too
    return PASSING.sub("…", "".join(texts)).strip(), drew


def alike(saved, fresh):
    "Whether two texts say the same; numbers may differ by a thousandth, as processors do"
    if NUMBER.sub("#", saved).split() != NUMBER.sub("#", fresh).split(): return False
    pairs = zip(NUMBER.findall(saved), NUMBER.findall(fresh), strict=True)
    return all(math.isclose(float(a), float(b), rel_tol=1e-3, abs_tol=1e-3) for a, b in pairs)


def execute(name):
    "Run one notebook in this process, its temporary files in a folder that goes with it; return what is wrong, empty if nothing is"
    os.chdir(ROOT / "nbs")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, patch.dict(os.environ, TMPDIR=folder), patch.object(tempfile, "tempdir", folder):
        return first_difference(name)


def first_difference(name):
    "What the first cell that fails, or gives something else than it shows, says"
    from execnb.shell import CaptureShell
    signal.signal(signal.SIGINT, signal.default_int_handler)   # as in a kernel, also where these tests run under nohup
    shell = CaptureShell(mpl_format="png")
    shell.run("import pandas; pandas.set_option('display.max_columns', 20); del pandas")   # as in a kernel
    for cell in nbformat.read(ROOT / "nbs" / name, 4).cells:
        if skipped(cell): continue
        text, drew = words(cell)
        quiet = "\nNone" if cell.source.rstrip().endswith(";") else ""   # the shell would keep what the cell prints to itself
        now, draws = words({"outputs": shell.run(cell.source + quiet)})
        if shell.exc: return f"{name}: {''.join(traceback.format_exception(shell.exc))}\nin\n{cell.source}"
        if drew != draws: return f"{name}: shows {'a picture' if drew else 'no picture'}, gives {'one' if draws else 'none'}:\n{cell.source}"
        if not alike(text, now): return f"{name}: shows\n{text}\nbut gives\n{now}\nin\n{cell.source}"
    return ""


@pytest.fixture(scope="module")
def results():
    "Each notebook in a process of its own, forked from one that has loaded the slow libraries"
    context = get_context("forkserver")
    context.set_forkserver_preload(["execnb.shell", "lightning_fabric", "matplotlib.pyplot", "nbdev.showdoc", "nbformat.validator", "pandas", "pytest", "scipy.stats", "timm", "torch._dynamo"])
    with patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore:IProgress not found"):
        with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
            yield dict(zip(NOTEBOOKS, pool.map(execute, NOTEBOOKS), strict=True))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_shows_what_it_gives(results, name):
    assert results[name] == ""


def test_a_table_is_compared_by_its_numbers():
    def shown(value): return {"output_type": "execute_result", "data": {"text/html": "<table>", "text/plain": f"dice {value}"}}
    (first, drew), (second, _) = (words({"outputs": [shown(value)]}) for value in (0.8, 0.1))
    assert drew and not alike(first, second)


def test_a_stale_output_is_noticed():
    assert alike("Dice 0.81234\n", "Dice 0.81235 ") and not alike("Dice 0.8", "Dice 0.9") and not alike("Dice 0.8", "Jaccard 0.8") and not alike("", "1")


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda path: path.stem)
def test_no_output_tells_where_it_was_made(path):
    outputs = [cell.get("outputs", []) for cell in nbformat.read(path, 4).cells]
    places = [Path.home(), ROOT, Path(pytest.__file__).parent.parent]
    assert not re.search("|".join(["site-packages", *(re.escape(str(place)) for place in places)]), str(outputs))
