"""What an edit runs again: each room's code decides the numbers of the stages that `levit_study.stages` names it for, and of no other."""
import ast
import json
import re
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from levit_study.data import jobs
from levit_study.losses import build_loss
from levit_study.stages import ROOMS
from levit_study.training import identity

# The rooms that decide no stage's numbers: they speak, measure, describe, check or start.
NOTHING = """consistency files code processes training.identity inputs kinds networks settings params sections machine stages pipeline matrix job slurm submit submit_command publish_command plan_command report.overview bench commands data.fingerprint model.weights model.export model.drawing
             training.record training.launch losses.pictures evaluation.engine evaluation.loading evaluation.targets evaluation.predict evaluation.sharing evaluation.ensemble evaluation.maps
             evaluation.score evaluation.exchange evaluation.ensemble_runs evidence.simulation evidence.choice evidence.spreads evidence.power evidence.planning evidence.publishing
             report.data_figures report.examples report.overlay""".split()
# A stage's code reaches more rooms than decide its numbers: settings are checked before (params), pictures shown in passing
# (report), files written (files), a machine described. Of a case that is prepared, the rooms that read scans are not used again.
REACHED = {
    "prepare": ["files", "code", "processes", "params", "consistency", "inputs", "kinds", "networks", "settings", "sections", "recipes", "losses", "model", "report", "evidence.intervals", "evidence.words", "data.fingerprint",
                "data.native", "data.augment"],
    "train": ["files", "code", "processes", "params", "consistency", "inputs", "kinds", "networks", "settings", "sections", "machine", "model.weights", "training.record", "training.identity", "training.launch",
              "report", "evidence.intervals", "evidence.words", "data.cases"],
    "evaluate": ["files", "code", "processes", "params", "consistency", "inputs", "kinds", "networks", "settings", "sections", "recipes", "losses", "machine", "model.weights", "model.pretrained", "model.freezing",
                 "training.record", "training.device", "training.identity", "training.state", "data.augment", "data.affines", "data.nifti", "data.channels", "data.labels", "data.volumes"],
    "report": ["files", "code", "processes", "params", "consistency", "inputs", "kinds", "networks", "settings", "sections", "recipes", "losses", "model", "machine", "data.augment", "data.affines", "data.nifti",
               "data.channels", "data.labels", "data.volumes"],
    "site": ["files", "code", "processes", "params", "consistency", "inputs", "kinds", "networks", "settings", "sections", "recipes", "losses", "model", "data", "training", "evidence.statistics",
             "evidence.intervals", "evidence.words", "evidence.answer", "evidence.findings", "evidence.claims", "evidence.tables", "evaluation"],
}


def rooms(root):
    "The package's modules by their dotted names"
    package = root / "levit_study"
    paths = [path.relative_to(package).with_suffix("") for path in package.rglob("*.py") if not path.name.startswith("_")]
    return {".".join(path.parts) for path in paths}


def imported(code, package=()):
    "The rooms that code imports"
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.ImportFrom): continue
        base = list(package[:len(package) - node.level + 1]) if node.level else []
        name = ".".join([*base, *filter(None, [(node.module or "").removeprefix("levit_study").lstrip(".")])])
        if node.level or (node.module or "").startswith("levit_study"):
            yield name
            yield from (f"{name}.{alias.name}".lstrip(".") for alias in node.names)


def reached(root, stage):
    "All rooms that a stage's notebook imports, and these, and so on"
    cells = json.loads((root / f"nbs/study/{stage}.ipynb").read_text())["cells"]
    first = imported("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    return set().union(*(imports_of(root, room) for room in first))


def imports_of(root, room):
    "A room, all rooms that it imports, and these, and so on"
    todo, seen = {room}, set()
    while todo:
        room = todo.pop()
        path = root / "levit_study" / f"{room.replace('.', '/')}.py"
        if room in seen or not path.exists(): continue
        seen.add(room)
        todo |= set(imported(path.read_text(), room.split(".")[:-1]))
    return seen


@pytest.fixture(scope="module")
def stages(root):
    return YAML(typ="safe").load((root / "dvc.yaml").read_text())["stages"]


def test_every_room_is_in_the_table(root):
    deciding = {room for names in ROOMS.values() for room in names}
    assert rooms(root) == deciding | set(NOTHING) and not deciding & set(NOTHING)


@pytest.mark.parametrize("stage", ROOMS)
def test_a_stage_depends_on_its_code_alone(stages, stage):
    folder = "build/code"
    assert [dep for dep in stages[stage]["deps"] if dep.startswith(folder) and "settings" not in dep] == [f"{folder}/{stage}.json"]
    assert not any(dep.startswith(("levit_study", "nbs/")) for dep in stages[stage]["deps"])


@pytest.mark.parametrize("stage", ROOMS)
def test_what_a_stage_reaches_decides_its_numbers_or_is_named_as_not(root, stage):
    rest = reached(root, stage) - set(ROOMS[stage])
    unnamed = [room for room in rest if not any(room == name or room.startswith(f"{name}.") for name in REACHED[stage])]
    assert unnamed == []
    late = {"losses.paper", "losses.more", "losses.topk", "losses.boundary", "losses.adaptive"}   # imported by the package that registers them
    assert set(ROOMS[stage]) - late <= reached(root, stage)


def test_prepared_cases_and_trainings_are_known_by_the_same_rooms(root):
    """A prepared case by what turns its file into slices; a training by its stage's rooms, its data by the prepared pixels, its loss by its classes' rooms."""
    assert set(jobs.PREPARING) < set(ROOMS["prepare"])
    speak = {"files", "data.cases"}   # what an error says, and where a file lies
    assert imports_of(root, "data.voxels") - speak == set(jobs.PREPARING)
    by_loss = {"losses.paper", "losses.more", "losses.topk", "losses.boundary", "losses.adaptive"}   # of these only those that a loss uses
    assert set(identity.TRAINING) == set(ROOMS["train"]) - by_loss


def written(folder, environment):
    "What `code` writes for a project: {path: text}"
    done = subprocess.run(["levit-study", "code", "build/code"], cwd=folder, env={**environment, "PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {str(path.relative_to(folder)): path.read_text() for path in (folder / "build/code").rglob("*.*")}


@pytest.fixture(scope="module")
def copy(project): return project("rooms")


def test_an_edit_of_what_a_room_does_changes_its_stages_alone(copy, environment, root):
    before, marked = written(copy, environment), {}
    for room in rooms(root):   # each with a mark of its own
        path = copy / "levit_study" / f"{room.replace('.', '/')}.py"
        path.write_text(path.read_text() + f"\nMARK = {room!r}\n")
    after = written(copy, environment)
    for name in (name for name, text in after.items() if text != before[name]):
        digests, earlier = json.loads(after[name]), json.loads(before[name])
        assert digests.keys() == earlier.keys()
        marked[name] = {file for file, digest in digests.items() if digest != earlier[file]}
    assert marked == {f"build/code/{stage}.json": {f"levit_study/{room.replace('.', '/')}.py" for room in names} for stage, names in ROOMS.items()}


def test_an_edit_of_a_notebook_changes_its_stage_alone(copy, environment):
    before = written(copy, environment)
    path = copy / "nbs/study/evaluate.ipynb"
    text = path.read_text()
    content = json.loads(text)
    content["cells"][-1] = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": "print(1)"}
    path.write_text(json.dumps(content))
    after = written(copy, environment)
    path.write_text(text)
    assert {name for name in after if after[name] != before[name]} == {"build/code/evaluate.json"}


def test_words_and_layout_change_nothing(copy, environment):
    before = written(copy, environment)
    path = copy / "levit_study/training/fit.py"
    text = path.read_text()
    reworded = re.sub(r'"""(.+?)"""', r'"""Another description."""', text, count=1, flags=re.S) + "\n\n# a comment\n"
    reworded = re.sub(r'StudyError\(f?"', r'\g<0>Now: ', reworded)
    assert reworded != text
    path.write_text(reworded)
    notebook = copy / "nbs/study/train.ipynb"
    notebook.write_text(notebook.read_text().replace("# ", "# # ", 1))
    assert written(copy, environment) == before


def test_a_setting_changes_what_it_is_for(copy, environment):
    before = written(copy, environment)
    path = copy / "params.yaml"
    text = path.read_text()
    path.write_text(text.replace("gamma: 2.0            # focus on", "gamma: 3.0            # focus on"))
    changed = {name for name, content in written(copy, environment).items() if content != before.get(name)}
    path.write_text(text)
    assert changed == {"build/code/settings/phantom_mr/focal.json", "build/code/settings/study.json"}  # the report names it


def test_a_default_written_out_changes_nothing(copy, environment):
    before = written(copy, environment)
    path = copy / "params.yaml"
    text = path.read_text()
    assert re.search(r"^  bootstrap: 2000 .*\n", text, flags=re.M)
    path.write_text(re.sub(r"^  bootstrap: 2000 .*\n", "", text, flags=re.M))
    without = written(copy, environment)
    path.write_text(text)
    assert without == before


OWN = """
from levit_study.losses import PixelLoss
from own.powers import raised

class Power(PixelLoss):
    "Mean over pixels of 1 - p_t, squared"
    def pixel_values(self, comparison): return raised(1 - comparison.log_true.exp())
"""


def test_an_edit_of_an_own_loss_changes_its_trainings_alone(copy, environment):
    (copy / "own/my_losses.py").write_text(OWN)
    (copy / "own/powers.py").write_text("def raised(values): return values**2\n")
    path = copy / "params.yaml"
    text = path.read_text()
    named = re.sub(r"^losses:.*$", r"\g<0>\n  power:\n    kind: own.my_losses.Power", text, count=1, flags=re.M)
    path.write_text(named.replace("    - focal_tversky\n", "    - power\n", 1))
    before = written(copy, environment)
    (copy / "own/powers.py").write_text("def raised(values): return values**3   # a helper of the loss\n")
    changed = {name for name, content in written(copy, environment).items() if content != before[name]}
    path.write_text(text)
    assert changed == {"build/code/settings/phantom_mr/power.json"}


def test_a_training_knows_the_own_modules_that_its_loss_uses(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/my_losses.py").write_text(OWN)
    (tmp_path / "own/powers.py").write_text("def raised(values): return values**2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "own"]: monkeypatch.delitem(sys.modules, name)
    code = identity.training_code(build_loss("own.my_losses.Power"))
    assert {"own.my_losses", "own.powers"} < code.keys()


@pytest.mark.parametrize("use", ["from own.config import GAMMA", "import own.config\nGAMMA = own.config.GAMMA", "from .config import GAMMA",
                                 "def value():\n    from own.config import GAMMA\n    return GAMMA", "from own import config"])
def test_a_constant_of_an_own_module_counts_however_it_is_imported(tmp_path, monkeypatch, use):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/my_losses.py").write_text(f"{use}\n{OWN}")
    (tmp_path / "own/powers.py").write_text("def raised(values): return values**2\n")
    (tmp_path / "own/config.py").write_text("GAMMA = 2.0\n")
    (tmp_path / "own/unused.py").write_text("GAMMA = 2.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "own"]: monkeypatch.delitem(sys.modules, name)
    criterion = build_loss("own.my_losses.Power")
    before = identity.training_code(criterion)
    assert "own.unused" not in before and "own" not in before
    (tmp_path / "own/config.py").write_text("GAMMA = 4.0\n")
    after = identity.training_code(criterion)
    assert {key for key in after if after[key] != before[key]} == {"own.config"}
    (tmp_path / "own/table.csv").write_text("1,2\n")   # what a module may read
    first = identity.training_code(criterion)["own"]
    (tmp_path / "own/table.csv").write_text("1,3\n")
    assert identity.training_code(criterion)["own"] != first


@pytest.mark.parametrize("key, value", [("folder", "data/raw/moved"), ("skip_bad", True), ("keep_copies", True)])
def test_where_the_scans_lie_causes_no_training(copy, environment, key, value):
    path = copy / "params.yaml"
    text = path.read_text()
    before = written(copy, environment)
    content = YAML(typ="safe").load(path)
    content["datasets"]["phantom_mr"]["data"][key] = value
    path.write_text(json.dumps(content))   # JSON is YAML, too
    changed = {name for name, content in written(copy, environment).items() if content != before[name]}
    path.write_text(text)
    assert changed == {"build/code/settings/phantom_mr/data.json", "build/code/settings/study.json"}
