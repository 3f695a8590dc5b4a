"""The statistics on partial and broken studies: whatever part of a study exists is reported, the rest is named."""
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from levit_study.files import run_folders
from levit_study.params import load_params, pick_run
from levit_study.evidence.results import collect
from levit_study.evidence.intervals import bootstrap_interval
from levit_study.evidence.statistics import holm, paired_tests
from levit_study.evidence.tables import convergence, optimism, organ_table, table1, to_markdown
from levit_study.evidence.claims import CLAIMS
from levit_study.evidence.verdicts import claims_ledger

SCORES = "dice jaccard hd95 asd nsd sensitivity specificity precision transunet_dice transunet_hd95".split()
HEAD = ",".join(["split", "case", "structure", "voxels", "predicted_voxels", "volume_ml", "predicted_volume_ml", "unit", *SCORES, ""]).encode()[:-1] + b"\n"
SIZES, ONES, CURVE = b"1,1,1,1,mm,", b"1," * 9 + b"1\n", b"epoch,train_loss,valid_loss,valid_dice,valid_jaccard,seconds\n"
LOSSES, VERDICTS = ["baseline", "focal", "focal_tversky"], {"supported", "contradicted", "inconclusive"}


def study(random, datasets=("acdc",), losses=LOSSES, seeds=(0, 1), patients=4, epochs=5):
    "Return (epochs, cases) of a made-up study"
    runs = pd.MultiIndex.from_product([datasets, losses, seeds], names=["dataset", "loss", "seed"]).to_frame(index=False).assign(fold=0)
    curve = runs.merge(pd.DataFrame({"epoch": range(1, epochs + 1)}), how="cross")
    for name in ("train_loss", "valid_loss", "train_dice", "valid_dice", "valid_jaccard", "seconds"): curve[name] = random.random(len(curve))
    units = pd.MultiIndex.from_product([["valid", "test"], [f"patient{n:03}_frame{f:02}" for n in range(patients) for f in (1, 9)], ["aorta", "liver"]],
                                       names=["split", "case", "structure"]).to_frame(index=False)
    units["voxels"] = random.integers(0, 3, len(units))  # of the reference, which all runs share
    cases = runs.merge(units, how="cross").assign(unit="mm")
    for name in SCORES: cases[name] = random.random(len(cases))
    for name in ("predicted_voxels", "volume_ml", "predicted_volume_ml"): cases[name] = random.integers(0, 3, len(cases))
    return curve, cases


def everything(epochs, cases):
    "Run all that the report runs; return the ledger"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning in the middle of a report is a case that nobody thought of
        for function in (organ_table, paired_tests, optimism): to_markdown(function(cases, resamples=50))
        for function in (convergence, table1): to_markdown(function(epochs))
        return claims_ledger(epochs, cases, ["acdc"], resamples=50)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_any_part_of_a_study_is_reported(seed, kept, undefined):
    random = np.random.default_rng(seed)
    epochs, cases = (table[random.random(len(table)) < kept].copy() for table in study(random))
    for table, name in ((epochs, "valid_dice"), (cases, "dice"), (cases, "hd95"), (cases, "sensitivity")):
        table.loc[random.random(len(table)) < undefined, name] = np.nan
    ledger = everything(epochs, cases)
    assert list(ledger.claim) == list(CLAIMS) and set(ledger.verdict) <= VERDICTS
    assert ledger.evidence.str.len().gt(5).all()
    decided = ledger[ledger.verdict != "inconclusive"]
    assert decided.interval.str.contains(r"\[").all()  # no verdict without an interval


def test_rows_in_any_order_give_the_same_ledger():
    epochs, cases = study(np.random.default_rng(0))
    shuffled = everything(epochs.sample(frac=1, random_state=1), cases.sample(frac=1, random_state=1))
    pd.testing.assert_frame_equal(shuffled, everything(epochs, cases))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_interval_holds_its_estimate(values):
    estimate, low, high, *_ = bootstrap_interval(values, resamples=200)
    assert low - 1e-9 <= estimate <= high + 1e-9 and estimate == pytest.approx(np.mean(values))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(values):
    adjusted = holm(values)
    assert (adjusted >= np.array(values) - 1e-12).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(values)]) >= -1e-12).all()


@pytest.mark.parametrize(("file", "content", "said"), [
    ("epochs.csv", b"", "not a table"),
    ("epochs.csv", CURVE, "no rows"),
    ("cases.csv", b"\xff\xfe\x00\x01" * 50, "not a table"),
    ("cases.csv", b"split,case\nvalid,a\n", "no column structure"),
    ("cases.csv", b"split,case,structure,dice,jaccard,hd95,sensitivity,specificity,voxels\nvalid,a,liver,1,1,1,1,1,1\n",
     "no column asd, nsd, precision, predicted_voxels, volume_ml, predicted_volume_ml, unit, transunet_dice, transunet_hd95; run dvc repro"),
    ("epochs.csv", b"epoch,train_loss,valid_loss,valid_dice,valid_jaccard\n1,1,1,.5,.4\n", "no column seconds; run dvc repro"),
    ("cases.csv", HEAD + b"valid,a,liver," + SIZES + b"high," + ONES[2:], "not a number"),
    ("epochs.csv", CURVE + b",1,1,.5,.4,1\n", "an epoch has no number"),
    ("epochs.csv", CURVE + b"1,1,1,99,.4,1\n", "valid_dice = 99 is not a number from 0 to 1"),
    ("epochs.csv", CURVE + b"1,1,1,.5,.4,1\n" * 2, "epoch 1 is listed twice"),
    ("reliability.csv", b"split,bin,pixels,confidence,accuracy\nvalid,0,-9,.8,.7\n", "pixels = -9 is not a number of 0 or more"),
    ("cases.csv", HEAD + b"valid,,liver," + SIZES + ONES, "a row names no case"),
    ("cases.csv", HEAD + b"valid,a,," + SIZES + ONES, "a row names no structure"),
    ("cases.csv", HEAD + b"valid,a,liver,inf" + SIZES[1:] + ONES, "voxels = inf is not a number of 0 or more, and finite"),
    ("cases.csv", HEAD + b"valid,a,liver," + SIZES + b"7," + ONES[2:], "dice = 7 is not a number from 0 to 1"),
    ("cases.csv", HEAD + (b"valid,a,liver," + SIZES + ONES) * 2, "a, liver is listed twice"),
    ("metrics.json", b"{", "not JSON"),
    ("metrics.json", b"[1]", "not a mapping"),
    ("metrics.json", b"[" * 100_000, "not JSON"),
    ("metrics.json", b'{"parameters": [1]}', "parameters is not a mapping"),
    ("metrics.json", b'{"parameters": "x"}', "parameters is not a mapping"),
])
def test_a_broken_file_is_one_line_and_the_rest_is_reported(tmp_path, file, content, said):
    epochs, cases = study(np.random.default_rng(0))
    params = load_params({"study": {"datasets": ["acdc"], "losses": LOSSES, "seeds": [0, 1]}, "losses": {loss: {"kind": loss} for loss in LOSSES},
                          "datasets": {"acdc": {"title": "ACDC", "data": {"folder": "x", "structures": {"aorta": 1, "liver": 2}}}}})
    for (loss, seed), run in epochs.groupby(["loss", "seed"]):
        folder = run_folders("acdc", loss, seed, tmp_path)[0]
        folder.mkdir(parents=True)
        run.drop(columns=["dataset", "loss", "seed"]).to_csv(folder / "epochs.csv", index=False)
        cases[(cases.loss == loss) & (cases.seed == seed)].drop(columns=["dataset", "loss", "seed"]).to_csv(folder / "cases.csv", index=False)
        pd.DataFrame({"split": ["valid"], "bin": 0, "pixels": 9, "confidence": .8, "accuracy": .7}).to_csv(folder / "reliability.csv", index=False)
        record = pick_run(params, "acdc", loss, seed).record()
        (folder / "metrics.json").write_text(json.dumps({"best_dice": .5, "seed": seed, "loss": loss, "parameters": record}))
    broken = run_folders("acdc", "focal", 1, tmp_path)[0] / file
    broken.write_bytes(content)
    found = collect(params, tmp_path)
    assert len(found.problems) == 1 and str(broken) in found.problems[0] and said in found.problems[0] and "\n" not in found.problems[0]
    assert set(found.epochs.loss) == set(LOSSES) and set(found.cases.loss) == set(LOSSES)
    everything(found.epochs, found.cases)
