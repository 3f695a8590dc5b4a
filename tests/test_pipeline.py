"""The whole study on a minute phantom, in a copy of the project: twice, with a change, after reading, and with what goes wrong."""
import csv
import json
import os
import re
import shutil
import subprocess

import h5py
import nbformat
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML

from levit_study.data.dataset import PreparedStore
from levit_study.evaluation.card import settings_for, write_card
from levit_study.evaluation.evaluate import evaluate
from levit_study.evaluation.inference import load_network
from levit_study.model.build import levit_unet
from levit_study.model.weights import read_card, save_weights
from levit_study.data.nifti import canonical

LOSSES = ["baseline", "focal", "focal_tversky"]


def change(folder, edit):
    "Edit params.yaml as a user would, comments kept"
    yaml = YAML()
    content = yaml.load((folder / "params.yaml").read_text())
    edit(content)
    with open(folder / "params.yaml", "w") as file: yaml.dump(content, file)


def tiny(content):
    "Make the phantom's study so small that it takes seconds"
    content["study"]["datasets"] = ["phantom_ct"]
    phantom = content["datasets"]["phantom_ct"]
    phantom["data"].update(size=32, phantom={"kind": "ct", "cases": 8, "shape": [6, 48, 48], "seed": 0})
    phantom["training"].update(epochs=1, batch_size=8)
    phantom["evaluation"].update(flips=True, largest_regions=True)
    content["evaluation"]["bootstrap"] = 100


def repro(folder, environment, *options, fails=False):
    "Run `dvc repro`; return the stages that ran and all that was printed"
    done = subprocess.run(["dvc", "repro", *options], cwd=folder, env={**environment, "PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=1500)
    said = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, said[-6000:]
    return re.findall(r"^Running stage '(.+?)'", said, re.M), said


def command(folder, environment, *arguments):
    return subprocess.run(["levit-study", *arguments], cwd=folder, env={**environment, "PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=1500)


@pytest.fixture(scope="module")
def study(project, environment):
    "A copy of the project in which the tiny study has run once, trainings side by side where there are two cores"
    folder = project("study", library=False)
    change(folder, tiny)
    subprocess.run(["dvc", "config", "core.analytics", "false"], cwd=folder, env=environment, check=True)
    done = command(folder, environment, "submit", "--local", str(min(2, len(os.sched_getaffinity(0)))))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [f"phantom_ct {loss} seed 0: done" in done.stdout for loss in LOSSES] == [True] * len(LOSSES)
    return folder


def test_every_result_is_there(study):
    for loss in LOSSES:
        run = study / "reports/runs/phantom_ct" / loss / "seed0"
        metrics = json.loads((run / "metrics.json").read_text())
        wanted = "train_loss valid_loss valid_dice valid_jaccard best_dice best_jaccard best_epoch test_dice test_jaccard test_hd95"
        assert set(wanted.split()) <= set(metrics)
        assert metrics["parameters"]["loss"] == loss and metrics["parameters"]["training"]["epochs"] == 1
        with open(run / "epochs.csv") as file: assert {"epoch", "train_loss", "valid_loss", "valid_dice", "learning_rate",
                                                       "seconds"} <= set(next(csv.reader(file)))
        with open(run / "cases.csv") as file: rows = list(csv.DictReader(file))
        assert {r["split"] for r in rows} == {"valid", "test"} and len({r["structure"] for r in rows}) == 8
        assert not {r["case"] for r in rows if r["split"] == "valid"} & {r["case"] for r in rows if r["split"] == "test"}
    for name in ["table1.csv", "table1.md", "organs.csv", "derived.csv", "claims.csv", "index.html", "site/index.html", *[f"figures/fig{k}.{kind}" for k in range(1,
            5) for kind in ("png", "svg")]]:
        assert (study / "reports" / name).stat().st_size > 100, name
    with open(study / "reports/claims.csv") as file: assert {r["verdict"] for r in csv.DictReader(file)} <= {"supported", "contradicted", "inconclusive"}
    assert "ynthetic" in (study / "reports/table1.md").read_text()


def test_a_new_scan_is_segmented_as_the_weights_were_evaluated(study, environment, tmp_path):
    store = PreparedStore(study / "data/prepared/phantom_ct.h5")
    trained = study / "models/phantom_ct/baseline/seed0/best.safetensors"
    card = read_card(trained)
    used, origin = settings_for(trained, card)
    assert (used.flips, used.largest_regions, origin) == (True, True, "as these weights were evaluated")
    torch.manual_seed(0)   # one epoch finds nothing but background; a random network's labels differ from view to view
    known = {key: card[key] for key in ("dataset", "loss", "seed", "synthetic", "structures", "intensity", "window", "crop")}
    save_weights(weights := tmp_path / "random.safetensors", levit_unet("128s", store.num_classes, image_size=store.size), **known)
    network = load_network(weights, used)
    evaluate(store, network, tmp_path / "predictions.h5", ("test",))
    write_card(network, {}, 2.0)
    case = store.split("test")[0]
    with h5py.File(tmp_path / "predictions.h5") as file: evaluated = file[case][:]
    scan = next((study / "data/raw/phantom_ct").rglob(f"img{case[-4:]}.nii.gz"))

    def segmented(name, *options):
        done = command(study, environment, "predict", str(scan), "--weights", str(weights), "--output", str(tmp_path / name), *options)
        assert done.returncode == 0, done.stderr
        image = nib.load(tmp_path / name)
        return canonical(np.asarray(image.dataobj), image.affine)[0], done.stderr
    found, said = segmented("as_evaluated.nii.gz")
    assert len(np.unique(found)) > 2 and np.array_equal(found, evaluated) and "predicting with mirrored slices, largest regions" in said
    plain, said = segmented("plain.nii.gz", "--no-flips", "--no-largest-regions")
    assert not np.array_equal(plain, evaluated) and "predicting with each slice once" in said
    assert json.loads((tmp_path / "plain.json").read_text())["predicted"] == {"flips": False, "zooms": [1.0], "largest_regions": False}


def test_no_half_written_files(study):
    left = [p for p in study.rglob(".*") if re.match(r"\.\d+\.", p.name)]
    assert left == []


def test_second_repro_does_nothing(study, environment):
    stages, said = repro(study, environment)
    assert stages == [] and "up to date" in said
    done = command(study, environment, "submit", "--local", "1", "--dry-run")
    assert (done.returncode, done.stdout.splitlines()) == (0, ["nothing is missing: all trainings and evaluations are up to date"]), done.stderr


def waiting(study, environment):
    "The stages that would run now, after `code` has written out what they depend on"
    repro(study, environment, "code")
    done = subprocess.run(["dvc", "status", "--json"], cwd=study, env=environment, capture_output=True, text=True)
    return set(json.loads(done.stdout))


def test_reading_costs_no_training(study, environment):
    path = study / "nbs/study/train.ipynb"
    before = path.read_text()
    notebook = nbformat.read(path, 4)
    notebook.cells[0].source += "\n\nReworded."
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="seen\n")]
    notebook.cells[-1].execution_count = 3
    try:
        nbformat.write(notebook, path)
        assert set(repro(study, environment)[0]) <= {"code"}
        notebook.cells[-1].source += "\nlen('more')"
        nbformat.write(notebook, path)
        assert waiting(study, environment) == {f"train@phantom_ct-{loss}-0-." for loss in LOSSES}
    finally: path.write_text(before)
    assert repro(study, environment)[0] == ["code"]


@pytest.mark.parametrize("room, stages", [("report/figures", {"report"}), ("evidence/statistics", {"report"}), ("bench", set()),
                                          ("losses/paper", {f"train@phantom_ct-{loss}-0-." for loss in LOSSES})])
def test_code_changes_what_depends_on_it(study, environment, room, stages):
    path = study / "levit_study" / f"{room}.py"
    before = path.read_text()
    try:
        path.write_text(before + "\n# reworded\n")
        assert waiting(study, environment) == set()
        path.write_text(before + "\nEDITED = True\n")
        assert waiting(study, environment) == stages
    finally: path.write_text(before)
    assert waiting(study, environment) == set()


def test_changed_code_trains_anew(study, environment):
    path, stage = study / "levit_study/losses/paper.py", "train@phantom_ct-focal-0-."
    run = study / "reports/runs/phantom_ct/focal/seed0"
    before, record = path.read_text(), (run / "run.json").read_bytes()
    def first_loss():
        with open(run / "epochs.csv") as file: return float(next(csv.DictReader(file))["train_loss"])
    loss = first_loss()
    try:
        path.write_text(before + "\nFocalLoss.value = lambda self, comparison: 2 * PixelLoss.value(self, comparison)\n")
        assert stage in repro(study, environment, stage)[0]
        assert first_loss() == pytest.approx(2 * loss, rel=.02) and (run / "run.json").read_bytes() != record
    finally: path.write_text(before)
    repro(study, environment)
    assert first_loss() == loss


def test_a_foreign_run_is_refused(study, environment, tmp_path):
    path = study / "reports/runs/phantom_ct/focal/seed0/metrics.json"
    before = path.read_text()
    metrics = json.loads(before)
    metrics["parameters"]["loss_settings"] = {"kind": "baseline"}
    path.write_text(json.dumps(metrics))
    try: done = command(study, environment, "notebook", "nbs/study/report.ipynb", str(tmp_path / "report.ipynb"))
    finally: path.write_text(before)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "nbs/study/report.ipynb, cell" in last
    assert "metrics.json: was made with loss_settings.kind = 'baseline', params.yaml says 'focal'" in last


def test_one_parameter_reruns_its_part_alone(study, environment):
    before = (study / "reports/runs/phantom_ct/baseline/seed0/epochs.csv").read_bytes()
    change(study, lambda c: c["losses"]["focal"].update(gamma=1.0, training={"learning_rate": 0.001}))
    stages, _ = repro(study, environment)
    assert stages == ["code", "train@phantom_ct-focal-0-.", "evaluate@phantom_ct-focal-0-.", "report", "site"]
    assert (study / "reports/runs/phantom_ct/baseline/seed0/epochs.csv").read_bytes() == before
    used = json.loads((study / "reports/runs/phantom_ct/focal/seed0/metrics.json").read_text())["parameters"]
    assert used["loss_settings"]["gamma"] == 1.0 and used["training"]["learning_rate"] == 0.001
    assert "focal: learning_rate 0.001" in (study / "reports/report.ipynb").read_text()


def test_dvc_compares_one_number_a_column(study, environment):
    def shown(*arguments):
        done = subprocess.run(["dvc", *arguments], cwd=study, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout
    found = json.loads(shown("metrics", "show", "--json"))[""]["data"]
    assert set(found) == {"reports/summary.json"}
    scores = found["reports/summary.json"]["data"]["phantom_ct"]
    assert list(scores) == LOSSES and all("test_dice" in score for score in scores.values())
    for loss, score in scores.items():
        metrics = json.loads((study / "reports/runs/phantom_ct" / loss / "seed0/metrics.json").read_text())
        assert score["test_dice"] == pytest.approx(metrics["test_dice"], abs=6e-5)
    header = shown("exp", "show", "--csv", "--drop", ".*/").splitlines()[0].split(",")
    assert [f"phantom_ct.{loss}.test_dice" for loss in LOSSES] == [name for name in header if name.endswith("test_dice")]
    live = shown("metrics", "show", "--md", *(f"reports/runs/phantom_ct/{loss}/seed0/training.json" for loss in LOSSES))
    assert "best_dice" in live and all(loss in live for loss in LOSSES)


def test_the_page_of_plots_needs_no_network(study, environment, browser):
    subprocess.run(["levit-study", "plots-page", ".dvc/plots/page.html"], cwd=study, env=environment, check=True)
    subprocess.run(["dvc", "plots", "show"], cwd=study, env=environment, check=True, capture_output=True, timeout=300)
    page, asked, errors = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto((study / "dvc_plots/index.html").as_uri())
    page.wait_for_selector("canvas, svg.marks", timeout=60_000)
    page.wait_for_timeout(1000)
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == [] and errors == []
    assert page.locator("canvas, svg.marks").count() == 2 + len(LOSSES)   # all trainings, structures, and each training's own curve
    page.close()


def test_a_run_with_missing_files_is_named_and_the_rest_reported(study, environment, tmp_path):
    path = study / "reports/runs/phantom_ct/focal/seed0/cases.csv"
    predictions = study / "models/phantom_ct/baseline/seed0/predictions.h5"
    before = path.read_bytes()
    path.unlink()
    predictions.rename(predictions.with_suffix(".aside"))
    try: done = command(study, environment, "notebook", "nbs/study/report.ipynb", str(tmp_path / "report.ipynb"), "-p", "reports", str(tmp_path))
    finally:
        path.write_bytes(before)
        predictions.with_suffix(".aside").rename(predictions)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "report.ipynb").read_text()
    assert "left out: reports/runs/phantom_ct/focal/seed0: cases.csv missing" in said
    assert "left out: models/phantom_ct/baseline/seed0/predictions.h5: missing" in said and not (tmp_path / "figures/fig4.png").exists()
    with open(tmp_path / "organs.csv") as file: assert {row["loss"] for row in csv.DictReader(file)} == {"baseline", "focal_tversky"}


def test_data_sets_with_and_without_test_cases_are_reported_together(study, environment, tmp_path):
    second = study / "reports/runs/second"
    before = (study / "params.yaml").read_text()
    def edit(content):
        content["datasets"]["second"] = dict(content["datasets"]["phantom_ct"], title="Another data set")
        content["study"].update(datasets=["second", "phantom_ct"], losses=["focal", "baseline", "focal_tversky"])
    change(study, edit)
    shutil.copytree(study / "reports/runs/phantom_ct", second)
    for loss in LOSSES:   # the same runs as of a data set that has validation cases alone
        metrics = json.loads((second / loss / "seed0/metrics.json").read_text())
        metrics["parameters"]["dataset"] = "second"
        (second / loss / "seed0/metrics.json").write_text(json.dumps(metrics))
        for name in ("cases.csv", "reliability.csv"):
            table = pd.read_csv(second / loss / "seed0" / name)
            table[table.split == "valid"].to_csv(second / loss / "seed0" / name, index=False)
    try: done = command(study, environment, "notebook", "nbs/study/report.ipynb", str(tmp_path / "report.ipynb"), "-p", "reports", str(tmp_path))
    finally:
        (study / "params.yaml").write_text(before)
        shutil.rmtree(second)
    assert done.returncode == 0, done.stderr
    for name in ("forest", "dice_against_size", "reliability", "convention_shift"):
        for ending, title in (("", "phantom"), ("_validation", "Another data set")):
            caption = (tmp_path / f"figures/{name}{ending}.json").read_text()
            assert title in caption and (name != "forest" or "of 18 intervals" in caption), name   # 9 structures, two losses against the baseline
    with open(tmp_path / "tests.csv") as file: tests = list(csv.DictReader(file))
    assert {(row["dataset"], row["split"]) for row in tests} == {("second", "valid"), ("phantom_ct", "valid"), ("phantom_ct", "test")}


@pytest.mark.parametrize("edit, said", [
    (lambda c: c["losses"]["focal"].update(gama=1), "gama"),
    (lambda c: c["losses"]["focal"].update(gamma=-1), "gamma"),
    (lambda c: c["datasets"]["phantom_ct"]["training"].update(epochs="many"), "datasets.phantom_ct.training.epochs = 'many'"),
])
def test_bad_parameters_stop_with_one_line(study, environment, edit, said):
    before = (study / "params.yaml").read_text()
    change(study, edit)
    try: _, printed = repro(study, environment, fails=True)
    finally: (study / "params.yaml").write_text(before)
    line = next(line for line in printed.splitlines() if line.startswith("levit-study: error:"))
    assert said in line and "Traceback" not in printed


def test_absent_data_set_says_where_to_get_it(study, environment):
    before = (study / "params.yaml").read_text()
    shutil.rmtree(study / "data/raw/acdc", ignore_errors=True)
    (study / "data/raw/acdc").mkdir()
    (study / "data/raw/acdc/README.md").write_text("where to put the scans\n")
    change(study, lambda c: c["study"].update(datasets=["acdc"]))
    try: _, printed = repro(study, environment, fails=True)
    finally: (study / "params.yaml").write_text(before)
    line = next(line for line in printed.splitlines() if line.startswith("levit-study: error:"))
    assert "data/raw/acdc" in line and "patient001" in line
    assert not (study / "data/prepared/acdc.h5").exists()
