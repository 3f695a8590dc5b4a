"""The paper's and its peers' figures as data: misprints are common, so the numbers are checked against each other."""
from pathlib import Path

import pandas as pd
import pytest

from levit_study.evidence.tables import TABLE1
from levit_study.evidence.paper import paper_consistency

PAPER = Path(__file__).parents[1] / "data/paper"
LITERATURE = pd.read_csv(PAPER / "literature.csv")
ORGANS = {"synapse": ["aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach"],
          "acdc": ["right ventricle", "myocardium", "left ventricle"]}


@pytest.mark.parametrize("row", list(LITERATURE.itertuples(index=False)), ids=lambda row: f"{row.dataset}-{row.model}")
def test_organs_average_to_the_stated_mean(row):
    organs = LITERATURE.loc[(LITERATURE.dataset == row.dataset) & (LITERATURE.model == row.model), ORGANS.get(row.dataset, [])].iloc[0]
    if organs.isna().all():  # a row may state its mean alone, and then says why
        assert "organs left out" in row.note
    else:
        assert organs.notna().all()
        assert organs.mean() == pytest.approx(row.mean_dice, abs=.01)  # the mean and the organs are each rounded to 0.01


def test_every_row_has_a_source_and_says_whether_it_was_checked():
    assert LITERATURE.source.str.len().gt(10).all()
    assert LITERATURE.verified.isin(["yes", "no"]).all()
    assert LITERATURE.loc[LITERATURE.verified == "no", "note"].str.contains("not checked").all()
    assert not LITERATURE.duplicated(["dataset", "model"]).any()
    assert LITERATURE.loc[:, "aorta":"left ventricle"].stack().dropna().between(1, 100).all()  # percent, not fractions


def test_the_rows_of_equal_budgets_and_folds_are_kept_apart():
    folds = LITERATURE[LITERATURE.protocol == "five folds"].set_index(["dataset", "model"])
    assert folds.mean_dice["btcv", "nnU-Net"] == 83.08
    assert folds.mean_dice["acdc", "nnU-Net (5 folds)"] == 91.54 and folds.mean_dice["acdc", "MedNeXt L k3 (5 folds)"] == 92.65
    assert set(folds.patients["btcv"]) == {30} and set(folds.patients["acdc"]) == {100}
    assert LITERATURE.patients.notna().all() and LITERATURE.protocol.notna().all()


def test_the_papers_table_is_kept_as_printed():
    table = pd.read_csv(PAPER / "table1.csv").set_index("metric")
    assert list(table.index) == TABLE1
    assert table.loc["valid_loss", "baseline"] == .02467  # the doubtful figure, flagged and not mended
    assert "lost digit" in table.note["valid_loss"]
    assert table.loc["best_dice"].iloc[:3].tolist() == [.7853, .79954, .791]
    assert table.loc["best_epoch"].iloc[:3].tolist() == [29, 23, 28]
    assert "inconsistent" in set(paper_consistency(table.reset_index()).verdict)


def test_setup_names_the_papers_choice_and_this_studys():
    setup = pd.read_csv(PAPER / "setup.csv")
    assert list(setup.columns) == ["item", "paper", "this_study"] and setup.notna().all(axis=None)


def test_the_docs_name_each_claim_as_the_code_does(root):
    from levit_study.evidence.claims import CLAIMS
    page = (root / "docs/01_read_the_report.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("| C")][-1].startswith("| C15 | LeViT-UNet is a potent framework |")
    for number, claim in CLAIMS.items(): assert f"| {number} | {claim.statement} |" in page
