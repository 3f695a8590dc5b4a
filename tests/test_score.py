"""Other methods' label maps: this study's own, written out and scored again; nnU-Net's form of a split; what is wrong is named."""
import io
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from levit_study.commands import main
from levit_study.data.dataset import PreparedStore
from levit_study.data.phantom import make_phantom
from levit_study.data.prepare import prepare
from levit_study.evaluation.card import write_card
from levit_study.evaluation.evaluate import evaluate
from levit_study.evaluation.inference import load_network
from levit_study.evaluation.score import write_scores
from levit_study.evidence.results import collect
from levit_study.files import run_folders
from levit_study.model.build import levit_unet
from levit_study.model.weights import save_weights
from levit_study.params import load_params, pick_run

PARAMS = """
study: {datasets: [hearts], losses: [dice], seeds: [0, 1]}
losses: {dice: {kind: dice}}
datasets:
  hearts:
    title: Small hearts
    data:
      folder: data/raw/hearts
      layout: acdc
      structures: {right ventricle: 1, myocardium: 2, left ventricle: 3}
      intensity: minmax
      size: 32
      split: {kind: fraction, valid: 0.2, test: 0.4, seed: 0}
    model: {variant: 128s}
evaluation: {surface_tolerance: 3.0}
compute: {device: cpu}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A small study with two networks that nobody trained, evaluated; the working folder for this module"
    torch.set_num_threads(1)
    here, folder = os.getcwd(), tmp_path_factory.mktemp("study")
    os.chdir(folder)
    (folder / "params.yaml").write_text(PARAMS)
    params = load_params()
    data = params.datasets["hearts"].data
    make_phantom(data.folder, "mr", cases=5, shape=(4, 40, 36))
    prepare(data, folder / "data/prepared/hearts.h5", folder / "reports/data/hearts/manifest.json", 1, False)
    for seed in (0, 1): untrained_run(params, data, seed)
    yield params
    os.chdir(here)


def untrained_run(params, data, seed):
    "The files that a training and its evaluation leave, for random weights"
    torch.manual_seed(seed)
    reports, models = run_folders("hearts", "dice", seed)
    card = {"dataset": "hearts", "loss": "dice", "seed": seed, "structures": data.structures, "intensity": "minmax", "window": None}
    models.mkdir(parents=True)
    save_weights(models / "best.safetensors", levit_unet("128s", 4, image_size=32), **card)
    network = load_network(models / "best.safetensors", device="cpu", precision="fp32")
    store = PreparedStore("data/prepared/hearts.h5")
    cases, reliability = evaluate(store, network, models / "predictions.h5", tolerance=3.0, progress=False)
    write_card(network, {}, 3.0)
    write_scores(cases, reports / "cases.csv")
    write_scores(reliability, reports / "reliability.csv")
    epochs = {"epoch": [1], "train_loss": [1.0], "valid_loss": [1.0], "valid_dice": [0.1], "valid_jaccard": [0.1], "seconds": [1]}
    write_scores(pd.DataFrame(epochs), reports / "epochs.csv")
    record = pick_run(params, "hearts", "dice", seed).record()
    (reports / "metrics.json").write_text(json.dumps({"parameters": record, "best_dice": 0.1}))


def run(capsys, *arguments):
    "Run a command; return status, standard output, and standard error's lines"
    status = main([*map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err.splitlines()


@pytest.fixture(scope="module")
def files(study):
    "The data set in nnU-Net's form, and the first run's label maps as files"
    assert main(["export-splits", "hearts", "nnUNet_raw"]) == 0
    assert main(["export-predictions", "hearts", "dice", "own"]) == 0
    shutil.copytree("nnUNet_raw/Dataset501_hearts/labelsTr", "references")   # follows the links
    shutil.copytree("nnUNet_raw/Dataset501_hearts/labelsTs", "references", dirs_exist_ok=True)


def test_the_studys_own_label_maps_score_as_in_the_study_to_the_last_digit(files, capsys):
    own = pd.read_csv("reports/runs/hearts/dice/seed0/cases.csv", dtype=str).set_index(["case", "structure"])
    status, _, err = run(capsys, "score", "own", "references", "--dataset", "hearts", "--output", "again.csv")
    again = pd.read_csv("again.csv", dtype=str).set_index(["case", "structure"])
    assert status == 0 and set(own.columns) == set(again.columns)
    pd.testing.assert_frame_equal(again.drop(columns="split").loc[own.index], own.drop(columns="split"))
    trained = [line for line in err if "own: no label map of case" in line]   # only valid and test are predicted
    assert len(trained) == len(err) == 10 - len(own) / 3


def test_the_export_is_what_nnunet_trains_on(files):
    "dataset.json, links into the data set's folder, the study's split; read back, the same patients"
    from levit_study.data.layouts import find_cases
    folder = "nnUNet_raw/Dataset501_hearts"
    about = json.load(open(f"{folder}/dataset.json"))
    assert about["labels"] == {"background": 0, "right ventricle": 1, "myocardium": 2, "left ventricle": 3}
    assert about["numTraining"] == len(os.listdir(f"{folder}/imagesTr")) == len(os.listdir(f"{folder}/labelsTr"))
    assert all(name.endswith("_0000.nii.gz") and os.path.islink(f"{folder}/imagesTr/{name}") for name in os.listdir(f"{folder}/imagesTr"))
    splits = pd.read_csv("reports/data/hearts/splits.csv")
    of = {split: sorted(part.case) for split, part in splits.groupby("split")}
    assert json.load(open(f"{folder}/splits_final.json")) == [{"val": of["valid"], "train": of["train"]}]
    assert {case.name: case.split for case in find_cases(folder)} == dict(zip(splits.case, splits.split, strict=True))


def test_folds_become_entries_of_splits_final(files, study, capsys):
    table = pd.read_csv("reports/data/hearts/splits.csv")
    before = open("reports/data/hearts/splits.csv").read()
    names = list(table.case)
    for fold in (0, 1): table[f"fold{fold}"] = ["test" if k >= 8 else "valid" if k // 4 == fold else "train" for k in range(10)]
    table.to_csv("reports/data/hearts/splits.csv", index=False)
    open("params.yaml", "w").write(PARAMS.replace("seeds: [0, 1]", "seeds: [0, 1], folds: [fold0, fold1]"))
    assert run(capsys, "export-splits", "hearts", "nnUNet_raw", "--number", 502)[0] == 0
    open("params.yaml", "w").write(PARAMS)
    open("reports/data/hearts/splits.csv", "w").write(before)
    entries = json.load(open("nnUNet_raw/Dataset502_hearts/splits_final.json"))
    assert [entry["val"] for entry in entries] == [names[:4], names[4:8]] and entries[0]["train"] == names[4:8]


def test_an_export_replaces_nothing_and_stays_in_its_place(files, capsys):
    before = sorted(os.listdir("nnUNet_raw"))
    for arguments, message in ((("hearts", "nnUNet_raw"), "exists already"), (("tyop", "x"), "has no 'tyop'"),
                               (("hearts", "data/raw/hearts"), "would lie among the scans"), (("hearts", "x", "--number", "0"), "1 to 999")):
        status, _, err = run(capsys, "export-splits", *arguments)
        assert status == 1 and len(err) == 1 and message in err[0]
    assert sorted(os.listdir("nnUNet_raw")) == before and not os.path.exists("x")


def test_a_method_from_elsewhere_stands_beside_the_losses(files, study, capsys):
    status, _, _ = run(capsys, "score", "own", "references", "--dataset", "hearts", "--as", "nnunet")
    assert status == 0
    about = json.load(open("reports/elsewhere/hearts/nnunet/score.json"))
    assert about["tolerance"] == 3.0 and all(len(digest) == 64 for pair in about["digests"].values() for digest in pair)
    results = collect(study)
    rows = results.cases[results.cases.loss == "nnunet"]
    judged = results.cases[(results.cases.loss == "dice") & (results.cases.split == "test")]
    assert results.problems == [] and set(rows.case) == set(judged.case) and set(rows.split) == {"test"} and set(rows.seed) == {0}
    same = judged[judged.seed == 0].set_index(["case", "structure"]).dice
    pd.testing.assert_series_equal(rows.set_index(["case", "structure"]).dice.loc[same.index], same)
    from levit_study.evidence.statistics import paired_tests
    from levit_study.evidence.tables import organ_table
    tests, organs = paired_tests(results.cases, 0.95, 100), organ_table(results.cases, 0.95, 100)
    assert set(tests.difference.dropna()) == {0.0} and {"dice", "nnunet"} == set(organs.loss)
    shutil.rmtree("reports/elsewhere")


@pytest.mark.parametrize("file, change, message", [
    ("cases.csv", lambda text: text + text.partition("\n")[2], "listed twice; score again"),
    ("cases.csv", lambda text: columns(text, structure=""), "a row names no structure; score again"),
    ("cases.csv", lambda text: columns(text, dice=7.0), "dice = 7 is not a number from 0 to 1; score again"),
    ("cases.csv", lambda text: columns(text, sensitivity="inf"), "sensitivity = inf is not a number from 0 to 1"),
    ("cases.csv", lambda text: columns(text, hd95=-1), "hd95 = -1 is not a number of 0 or more"),
    ("cases.csv", lambda text: columns(text, dice="high"), "column dice holds something that is not a number"),
    ("cases.csv", lambda text: columns(text, diagonal="wide"), "column diagonal holds something that is not a number"),
    ("cases.csv", lambda text: text.partition("\n")[0], "no rows"),
    ("cases.csv", lambda text: "\n".join(line for line in text.splitlines() if "myocardium" not in line), "myocardium is missing from 4 of 4 cases"),
    ("score.json", lambda text: "[" * 100_000, "score.json: not JSON"),
    ("score.json", lambda text: "{", "score.json: not JSON"),
])
def test_scores_that_cannot_be_are_named(files, study, capsys, file, change, message):
    assert run(capsys, "score", "own", "references", "--dataset", "hearts", "--as", "nnunet")[0] == 0
    path = f"reports/elsewhere/hearts/nnunet/{file}"
    text = open(path).read()
    open(path, "w").write(change(text))
    problems = collect(study).problems
    shutil.rmtree("reports/elsewhere")
    assert len(problems) == 1 and message in problems[0] and "\n" not in problems[0], problems


def columns(text, **values):
    "A table's text with one value throughout some of its columns"
    return pd.read_csv(io.StringIO(text)).assign(**values).to_csv(index=False)


@pytest.mark.parametrize("options, message", [
    (["--as", "dice", "--dataset", "hearts"], "--as dice: is a loss of params.yaml"),
    (["--as", "a/../b", "--dataset", "hearts"], "a name may hold letters"),
    (["--as", "nnunet", "--structures", "a=1"], "--as needs --dataset"),
    (["--dataset", "tyop"], "datasets has no 'tyop'"),
    (["--as", "a" * 300, "--dataset", "hearts"], "letters, digits and underscores, 100 at most"),
    (["--structures", "a"], "--structures a: is not a pair"),
    (["--structures", "a=²"], "--structures a=²: values are whole numbers"),
    (["--structures", "a=" + "1" * 5000], "values are whole numbers, 1 to 254"),
    (["--dataset", "hearts", "--label-map", "²=myocardium"], "'²' is not a label value"),
    (["--dataset", "hearts", "--label-map", "1=²"], "1 leads to '²', which is not a structure"),
    (["--dataset", "hearts", "--label-map", "1" * 5000 + "=myocardium"], "is not a label value"),
    (["--dataset", "hearts", "--label-map", "1=" + "1" * 5000], "which is not a structure"),
    (["--dataset", "hearts", "--label-map", "btcv14"], "label_map: 'btcv14' is unknown"),
    (["--dataset", "hearts", "--label-map", "1=liver"], "1 leads to 'liver', which is not a structure"),
    (["--dataset", "hearts", "--output", "params.yaml/x.csv"], "params.yaml/x.csv: cannot be written"),
    (["--dataset", "hearts", "--output", "references/one.nii.gz"], "references/one.nii.gz: give a name that ends in .csv"),
])
def test_bad_options_are_one_line(files, capsys, options, message):
    status, _, err = run(capsys, "score", "own", "references", *options)
    assert status == 1 and message in err[-1] and not os.path.exists("reports/elsewhere")


def test_each_bad_label_map_is_named_and_the_rest_is_scored(files, capsys):
    shutil.copytree("own", "mixed")
    names = sorted(os.listdir("mixed"))
    good = sorted(set(os.listdir("references")) - set(names))
    for name in good: shutil.copy(f"references/{name}", f"mixed/{name}")
    cut, shifted, strange, damaged, wordy = (f"mixed/{name}" for name in names[:5])
    image = nib.load(cut)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:-1], image.affine), cut)
    image = nib.load(shifted)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine + 500 * np.eye(4, k=3)), shifted)
    image = nib.load(strange)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + np.uint8(20), image.affine), strange)
    open(damaged, "wb").write(b"\x1f\x8b damaged")
    os.rename(wordy, "mixed/someone.nii.gz")
    shutil.copy(f"own/{names[5]}", f"mixed/{names[5][:-7]}_0000.nii.gz")   # the same case twice
    status, out, err = run(capsys, "score", "mixed", "references", "--dataset", "hearts", "--output", "mixed.csv")
    text = "\n".join(err)
    assert status == 0 and set(pd.read_csv("mixed.csv").case) == {name[:-7] for name in good}
    for path, reason in ((cut, "voxels for an image of"), (shifted, "mm beside"), (strange, "not among the structures"), (damaged, "gzip"),
                         ("mixed/someone.nii.gz", "no such case in references"), (f"mixed/{names[5][:-7]}_0000.nii.gz", "a second file")):
        assert any(path in line and reason in line for line in err), (path, text)
    assert "Traceback" not in text
    for name in good: os.remove(f"mixed/{name}")
    status, _, err = run(capsys, "score", "mixed", "references", "--dataset", "hearts")
    assert status == 1 and "none of 4 cases can be scored" in err[-1] and cut in err[-1] and damaged in err[-1]


def test_a_label_map_beside_its_reference_is_refused_along_each_axis(tmp_path, capsys):
    "19 mm are nothing along an axis of 10 mm, and far off along one of 1 mm"
    labels = np.zeros((32, 32, 4), np.uint8)
    labels[8:16, 8:16] = 1
    for folder, shift in (("r", 0), ("near", 0.3), ("far", 19)):
        (tmp_path / folder).mkdir()
        affine = np.diag([1., 1, 10, 1])
        affine[0, 3] = shift
        nib.save(nib.Nifti1Image(labels, affine), tmp_path / folder / "a.nii.gz")
    status, _, err = run(capsys, "score", str(tmp_path / "far"), str(tmp_path / "r"), "--structures", "a=1")
    assert status == 1 and "19 mm beside the image's grid" in err[-1]
    status, _, err = run(capsys, "score", str(tmp_path / "near"), str(tmp_path / "r"), "--structures", "a=1")
    assert status == 0 and "affine is off the image's by 0.3 mm" in err[-1]


def test_what_cannot_be_kept_is_a_line_below_the_means(files, capsys):
    asked = "score", "own", "references", "--dataset", "hearts"
    status, out, err = run(capsys, *asked, "--output", "params.yaml/again.csv")
    assert status == 1 and "myocardium" in out and "params.yaml/again.csv: cannot be written (" in err[-1]
    os.makedirs("reports/elsewhere/hearts", exist_ok=True)
    open("reports/elsewhere/hearts/blocked", "w").close()
    status, _, err = run(capsys, *asked, "--as", "blocked")
    os.remove("reports/elsewhere/hearts/blocked")
    assert status == 1 and "reports/elsewhere/hearts/blocked: cannot be written (" in err[-1]


def test_scores_replace_scores_and_nothing_else(files, capsys):
    asked = "score", "own", "references", "--dataset", "hearts", "--output"
    status, _, err = run(capsys, *asked, "params.yaml")
    assert status == 1 and "--output params.yaml: give a name that ends in .csv" in err[-1]
    open("sizes.csv", "w").write("case,ml\n")
    status, out, err = run(capsys, *asked, "sizes.csv")
    assert status == 1 and not out and "--output sizes.csv: exists already, and holds no scores" in err[-1]
    assert open("sizes.csv").read() == "case,ml\n"
    for _ in range(2): assert run(capsys, *asked, "scores.csv")[0] == 0


def test_an_export_replaces_no_other_weights(files, capsys):
    own, other = (f"models/hearts/dice/seed{seed}/best.safetensors" for seed in (0, 1))
    before = open(other, "rb").read()
    status, _, err = run(capsys, "export", own, other)
    assert status == 1 and f"{other}: exists already, and is no copy of these weights" in err[-1]
    assert open(other, "rb").read() == before
    open("other.onnx", "w").write("somebody's")
    status, _, err = run(capsys, "export", own, "other.onnx")
    assert status == 1 and "other.onnx: exists already; name another file" in err[-1]
    assert open("other.onnx").read() == "somebody's"
    status, _, err = run(capsys, "export", own, "params.yaml/copy.onnx")
    assert status == 1 and "params.yaml/copy.onnx: cannot be written (" in err[-1]


def test_an_ensemble_sees_images_prepared_as_for_its_trainings(files, study, capsys):
    text = open("params.yaml").read()
    open("params.yaml", "w").write(text.replace("intensity: minmax", "intensity: percentile"))
    answers = [run(capsys, *asked) for asked in (("ensemble", "hearts", "dice"), ("choose", "hearts"))]
    open("params.yaml", "w").write(text)
    for status, _, err in answers:
        assert status == 1 and "was trained on images with intensity = 'minmax', params.yaml says 'percentile'" in err[-1]


def test_nothing_in_common_is_an_error(files, capsys):
    os.makedirs("strangers", exist_ok=True)
    shutil.copy(f"own/{sorted(os.listdir('own'))[0]}", "strangers/one.nii.gz")
    for folder, message in (("strangers", "no case is in both folders"), ("absent", "absent: no such folder"), ("models", "holds no .nii")):
        status, _, err = run(capsys, "score", folder, "references", "--dataset", "hearts")
        assert status == 1 and message in err[-1]


def test_an_ensemble_of_seeds_is_judged_on_test_cases_alone(files, capsys):
    status, out, _ = run(capsys, "ensemble", "hearts", "dice", "--over", "seeds")
    assert status == 0 and json.loads(out)["ensembles"][0]["ensemble"] == "seeds 0, 1"
    cases = pd.read_csv("reports/ensembles/hearts/dice/cases.csv")
    splits = pd.read_csv("reports/data/hearts/splits.csv").set_index("case").split
    assert set(cases.case) == set(splits.index[splits == "test"]) and set(cases.split) == {"test"}
    assert {"metrics.json", "reliability.csv"} < set(os.listdir("reports/ensembles/hearts/dice"))
    status, _, err = run(capsys, "ensemble", "hearts", "dice", "--over", "folds")
    assert status == 1 and "there is one network to average" in err[-1]
    card = "models/hearts/dice/seed1/card.json"
    text = open(card).read()
    open(card, "w").write(text.replace('"weights": "', '"weights": "0'))
    status, _, err = run(capsys, "ensemble", "hearts", "dice")
    open(card, "w").write(text)
    assert status == 1 and "seed1/best.safetensors: was trained again since" in err[-1]
