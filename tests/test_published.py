"""Every published number follows from its study's records."""
import json
import re
import shutil

import pandas as pd
import pytest

from levit_study.commands import main
from levit_study.evidence.imbalance import training_shares
from levit_study.evidence.published import verify_study
from levit_study.evidence.results import judging_splits
from levit_study.params import Run, load_params, pick_run
from levit_study.report.gallery import figure_words
from levit_study.report.overview import verify_differences
from levit_study.report.progress import differences_by_epoch

STUDIES = ["acdc_100", "acdc_100_small", "acdc_100_small_long", "acdc_100_two_by_two", "acdc_100_two_by_two_128", "acdc_100_two_by_two_seeds", "acdc_128", "acdc_128_controls", "acdc_128_rate", "acdc_224", "acdc_best", "acdc_model", "acdc_model_unet", "acdc_networks", "acdc_networks_128", "acdc_paper", "acdc_recipe", "acdc_recipe_seeds", "acdc_transfer", "phantom_imbalance"]


@pytest.fixture(autouse=True)
def at_the_root(root, monkeypatch): monkeypatch.chdir(root)


def test_all_studies_are_verified(root):
    assert sorted(path.parent.name for path in (root / "reports/studies").glob("*/runs")) == STUDIES


@pytest.mark.parametrize("name", STUDIES)
def test_a_published_study_follows_from_its_records(root, name):
    assert {file: problem for file, problem in verify_study(root / "reports/studies" / name, figure_words).items() if problem} == {}


def test_the_figure_of_all_studies_follows_from_them(root):
    assert verify_differences(root) == {"differences.csv": "", "differences.json": ""}
    rows = pd.read_csv(root / "reports/studies/differences.csv").query("loss == 'focal'")
    words = "none one two three four five six seven eight nine ten".split()
    below, established = (rows.difference < 0).sum(), rows.established.sum()
    sentence = f"below in {words[below]} of {words[len(rows)]} settings, and that is established in {words[established]} "
    assert sentence in (root / "README.md").read_text() and (rows.high < 0)[rows.established].all() and not (rows.low > 0).any()


def test_readme_says_what_shorter_trainings_would_have_shown(root):
    epochs = pd.read_csv(root / "reports/studies/acdc_100_two_by_two_128/epochs.csv")
    leads = differences_by_epoch(epochs).groupby(["loss", "epoch"]).difference.mean()
    text = (root / "README.md").read_text()
    for loss, name in {"focal": "focal", "cross_entropy": "cross-entropy", "dice": "Dice", "focal_tversky": "focal Tversky"}.items():
        numbers = " | ".join(f"{leads[loss, epoch]:.3f}".replace("-", "−") for epoch in (6, 12, 20, 30))
        assert f"| {name} | {numbers} |" in text, numbers


def test_log_and_readme_say_what_would_decide_it(root, capsys):
    asked = ["plan", "reports/studies/acdc_100", "--seeds", "1", "2", "4", "8", "20", "--patients", "99", "500", "1000"]
    assert main(asked) == 0
    cells = re.findall(r"^ +(\d+) +5 +(\d+) +(\S+ - \S+) +([\d.]+) +([\d.]+) ", capsys.readouterr().out, re.M)
    shown = {(int(patients), int(seeds), pair): (float(least), float(cautious)) for patients, seeds, pair, least, cautious in cells}
    pairs = ["focal - baseline", "focal_tversky - baseline", "focal_tversky - focal"]
    log, readme = ((root / path).read_text() for path in ("reports/studies/log.md", "README.md"))
    for seeds, name in {1: "1 (complete)", 2: "2 (the plan)", 4: "4", 8: "8"}.items():
        numbers = " | ".join("{:.3f} [{:.3f}]".format(*shown[99, seeds, pair]) for pair in pairs)
        assert f"| {name} | {numbers} | {15*seeds} |" in log, numbers
    with_two = [shown[99, 2, pair][0] for pair in pairs]
    assert f"two seeds show differences of {min(with_two):.3f} to {max(with_two):.3f} with" in readme
    assert min(shown[500, 20, pair][0] for pair in pairs) > .01 and shown[1000, 20, pairs[0]][0] < .01 < shown[1000, 20, pairs[1]][0]


@pytest.mark.parametrize("name", STUDIES)
def test_figures_without_cases_count_the_patients_that_judge(root, name):
    organs = pd.read_csv(root / "reports/studies" / name / "organs.csv")
    judged = organs[organs.split == organs.dataset.map(judging_splits(organs))]
    patients = set(judged.groupby("dataset").patients.max().astype(int))
    for path in (root / "reports/studies" / name / "figures").glob("*.json"):
        if not path.name.startswith(("claims", "ranking")): continue
        counted = set(map(int, re.findall(r"n = (\d+) patients", json.loads(path.read_text())["caption"])))
        assert counted and counted <= patients, path.name


def test_the_network_in_half_precision_scores_as_in_full(root):
    study = root / "reports/studies/acdc_model"
    key = ["case", "structure"]
    full = pd.read_csv(study / "runs/acdc_best/baseline/seed0/cases.csv").query("split == 'valid'")
    half = pd.read_csv(study / "model/half_precision.csv")
    both = full.merge(half, on=key, suffixes=("", "_half"), validate="one_to_one")
    assert len(both) == len(full) == len(half) == 120
    volumes = (both.dice_half - both.dice).groupby(both.case).mean()
    said = re.search(r"mean Dice differs by (\S+), no volume by more than (\S+) \|", (study / "model/README.md").read_text())
    assert abs(volumes.mean()) <= float(said[1]) and volumes.abs().max() <= float(said[2]) and float(said[2]) < .001


def test_a_changed_number_is_named(root, tmp_path, capsys):
    study = tmp_path / "acdc_128_controls"
    shutil.copytree(root / "reports/studies/acdc_128_controls", study)
    table = pd.read_csv(study / "organs.csv")
    table.loc[0, "dice"] += 0.001
    table.to_csv(study / "organs.csv", index=False)
    assert main(["verify", str(study)]) == 1
    told = capsys.readouterr()
    assert "organs.csv: column dice" in told.out and "table1.csv:" not in told.out
    assert " files follow from the records" in told.out and "1 of " in told.err


def test_a_caption_that_does_not_follow_is_named(root, tmp_path, capsys):
    study = tmp_path / "acdc_128_controls"
    shutil.copytree(root / "reports/studies/acdc_128_controls", study)
    words = study / "figures/fig1.json"
    words.write_text(words.read_text().replace("n = 10 patients", "n = 11 patients"))
    assert main(["verify", str(study)]) == 1
    printed = capsys.readouterr()
    assert re.findall(r"figures/(\S+): caption does not follow; ", printed.out) == ["fig1.json"] and "1 of " in printed.err


def test_a_damaged_manifest_is_named(root, tmp_path, capsys):
    study = tmp_path / "acdc_128_controls"
    shutil.copytree(root / "reports/studies/acdc_128_controls", study)
    (study / "data/acdc").mkdir(parents=True)
    (study / "data/acdc/manifest.json").write_text('{"cases": {"a": {"split": 1}}}')
    assert main(["verify", str(study)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "manifest.json" in line)
    assert "data/acdc/manifest.json: cases.a.split = 1: Input should be a valid string" in line and line.endswith("prepare or fetch it again")


def test_a_training_that_cannot_be_read_is_named(root, tmp_path, capsys):
    study = tmp_path / "acdc_128_controls"
    shutil.copytree(root / "reports/studies/acdc_128_controls", study)
    (study / "runs/acdc/focal_dice/seed0/run.json").write_text("{")
    (study / "summary.json").write_text("{")
    assert main(["verify", str(study)]) == 1
    out = capsys.readouterr().out
    assert "runs/acdc/focal_dice/seed0/run.json: not JSON" in out and "summary.json: cannot be read (" in out


def test_trainings_judged_by_different_label_maps_are_no_study(root, tmp_path, capsys):
    study = tmp_path / "acdc_128_controls"
    shutil.copytree(root / "reports/studies/acdc_128_controls", study)
    cases = study / "runs/acdc/focal_dice/seed0/cases.csv"
    table = pd.read_csv(cases)
    table[table.case != table.case[0]].to_csv(cases, index=False)
    assert main(["verify", str(study)]) == 1
    printed = capsys.readouterr()
    assert f"were judged by different label maps: {table.case[0]}, " in printed.out and "1 of 1 files" in printed.err


def test_a_case_without_voxels_has_no_share(tmp_path):
    (tmp_path / "hearts").mkdir()
    cases = {"a": {"split": "train", "voxels": {"background": 3, "spot": 1}}, "b": {"split": "train", "voxels": None}}
    (tmp_path / "hearts/manifest.json").write_text(json.dumps({"cases": cases}))
    assert training_shares(tmp_path, ["hearts"]).share.tolist() == [.25]


def test_what_is_no_published_study_is_said(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path}: has no params.yaml; a published study has params.yaml and runs/" in capsys.readouterr().err


def test_the_best_recipe_is_the_one_that_was_run(root):
    """acdc_best of params.yaml, as shipped, says what the published training of it recorded."""
    shipped = pick_run(load_params(root / "tests/params.yaml"), "acdc_best", "baseline", 0)
    record = root / "reports/studies/acdc_model_unet/runs/acdc_best/baseline/seed0/run.json"
    assert shipped.record() == Run.model_validate(json.loads(record.read_text())["parameters"]).record()
