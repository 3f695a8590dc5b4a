"""What an edit runs again: each room's code decides the numbers of the stages in this table, and of no other."""
import re
import subprocess

import pytest
from ruamel.yaml import YAML

from levit_study.data import jobs
from levit_study.training import state

PREPARE = """data.nifti data.labels data.volumes data.folders data.cases data.layouts data.splits data.shapes data.abdomen data.heart data.phantom
             data.slices data.dataset data.voxels data.store data.jobs data.manifest data.prepare""".split()
TRAIN = """recipes settings data.augment data.dataset model.upsampling model.grids model.network model.pretrained model.precision model.build
           losses.comparison losses.interface losses.paper losses.more losses.adaptive
           training.state training.scores training.fit""".split()
EVALUATE = """data.slices data.dataset data.native model.upsampling model.grids model.network model.precision model.build model.inference training.scores
              evaluation.metrics evaluation.inference evaluation.evaluate""".split()
REPORT = """data.dataset data.native evidence.results evidence.statistics evidence.tables evidence.claims evidence.paper
            report.look report.parts report.figures report.more_figures""".split()
SITE = "report.pages report.summary report.site".split()
TABLE = {"prepare": PREPARE, "train": TRAIN, "evaluate": EVALUATE, "report": REPORT, "site": SITE}
# What speaks, measures, describes, checks or starts: an edit of it makes nothing again.
NOTHING = """files params machine pipeline bench commands losses.pictures data.fingerprint model.weights model.export model.drawing
             training.record training.launch evaluation.predict report.data_figures""".split()


def rooms(root):
    "The package's modules by their dotted names"
    package = root / "levit_study"
    paths = [path.relative_to(package).with_suffix("") for path in package.rglob("*.py") if not path.name.startswith("_")]
    return {".".join(path.parts) for path in paths}


@pytest.fixture(scope="module")
def stages(root):
    return YAML(typ="safe").load((root / "dvc.yaml").read_text())["stages"]


def test_every_room_is_in_the_table(root):
    assert rooms(root) == {room for names in TABLE.values() for room in names} | set(NOTHING)


@pytest.mark.parametrize("stage", TABLE)
def test_a_stage_depends_on_the_rooms_that_decide_its_numbers(stages, stage):
    found = [m[1].replace("/", ".") for dep in stages[stage]["deps"] if (m := re.fullmatch(r"build/code/rooms/(.+)\.py", dep))]
    assert sorted(found) == sorted(TABLE[stage])
    assert not any(dep.startswith(("levit_study", "nbs/")) for dep in stages[stage]["deps"])


def test_prepared_cases_and_trainings_are_known_by_the_same_rooms():
    """A prepared case by what turns its file into slices; a training by its stage's rooms, its data by the prepared pixels, its loss by its classes' rooms."""
    assert set(jobs.PREPARING) < set(PREPARE)
    losses = {"losses.paper", "losses.more", "losses.adaptive", "settings"}
    assert set(state.TRAINING) | losses | {"recipes"} == set(TRAIN) | {"recipes"}


def written(folder, environment):
    "What `code` writes for a project: {path: text}"
    done = subprocess.run(["levit-study", "code", "build/code"], cwd=folder, env={**environment, "PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {str(path.relative_to(folder)): path.read_text() for path in (folder / "build/code").rglob("*.*")}


@pytest.fixture(scope="module")
def copy(project): return project("rooms")


def test_an_edit_of_what_a_room_does_changes_its_file_alone(copy, environment, root):
    before = written(copy, environment)
    for room in sorted(rooms(root)):
        path = copy / "levit_study" / f"{room.replace('.', '/')}.py"
        path.write_text(path.read_text() + "\nEDITED = True\n")
        after = written(copy, environment)
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed == {f"build/code/rooms/{room.replace('.', '/')}.py"}
        before = after


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
    assert changed == {"build/code/settings/phantom_ct/focal.json"}
