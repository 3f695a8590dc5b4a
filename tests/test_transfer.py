"""From synthetic hearts with one contrast to others with another, with few patients and with all: synthetic throughout, and far too short to say which start is better."""
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from levit_study.data.dataset import PreparedStore
from levit_study.data.labels import acdc_structures
from levit_study.data.phantom import make_phantom
from levit_study.data.prepare import prepare
from levit_study.evaluation.evaluate import evaluate
from levit_study.evaluation.inference import load_network
from levit_study.evidence.transfer import transfer_table
from levit_study.params import load_params, pick_run
from levit_study.report.look import about_study
from levit_study.report.transfer import dice_against_patients
from levit_study.training.fit import fit


def entry(folder, fewer=None, start=False, contrast=1.0):
    "A data set of ten synthetic hearts"
    split = {"kind": "fraction", "valid": .2, "test": .3, "train_patients": fewer}
    data = {"folder": str(folder), "layout": "acdc", "structures": acdc_structures, "size": 32, "split": split,
            "phantom": {"kind": "mr", "cases": 10, "shape": [4, 40, 40], "contrast": contrast}}
    training = {"epochs": 1, "precision": "fp32", "freeze_encoder_epochs": 1 if start else 0}
    return {"title": "Synthetic hearts", "data": data, "model": {"variant": "128s", "pretrained": start}, "training": training}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "params of a study from a source to a target, and the folder that it lies in"
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("transfer")
    source = str(folder/"source/best.safetensors")
    entries = {"source": entry(folder/"raw_source", 2, contrast=2.0)}
    entries |= {f"hearts_{number or 'all'}{'_from' if start else ''}": entry(folder/"raw", number, source if start else False)
                for number in (2, None) for start in (False, True)}
    targets = [name for name in entries if name != "source"]
    return folder, load_params({"study": {"datasets": targets, "losses": ["baseline"], "seeds": [0]}, "datasets": entries,
                                "losses": {"baseline": {"kind": "baseline"}}, "evaluation": {"bootstrap": 100}})


def train(folder, params, dataset):
    "Prepare, train one epoch, and return the cases' scores"
    data = params.datasets[dataset].data
    make_phantom(data.folder, **data.phantom.model_dump())
    prepare(data, folder/f"{dataset}.h5", folder/dataset/"manifest.json", progress=False)
    run = pick_run(params, dataset, "baseline", 0)
    fit(run, folder/f"{dataset}.h5", folder/dataset, folder/dataset, "cpu", lambda line: None, progress=False)
    cases, _ = evaluate(PreparedStore(folder/f"{dataset}.h5"), load_network(folder/dataset/"best.safetensors", device="cpu"), progress=False)
    return cases.assign(dataset=dataset, loss="baseline", seed=0, fold=0)


def test_a_study_of_transfer_from_raw_files_to_its_figure(study):
    folder, params = study
    train(folder, params, "source")
    cases = pd.concat([train(folder, params, name) for name in params.study.datasets], ignore_index=True)
    source, still, free = (load_file(folder/name/"best.safetensors") for name in ("source", "hearts_2_from", "hearts_2"))
    encoder = [name for name in source if name.startswith(("stem.", "stages."))]
    assert all(torch.equal(source[name], still[name]) for name in encoder)   # held still in its only epoch
    assert not all(torch.equal(source[name], free[name]) for name in encoder)
    table = transfer_table(params, cases, folder)
    assert dict(zip(table.dataset, table.patients)) == {"hearts_2": 2, "hearts_2_from": 2, "hearts_all": 5, "hearts_all_from": 5}
    assert table.gain.notna().sum() == 2 and (table.judged == 3).all()
    picture = dice_against_patients(table, about_study(params, "test", cases))
    assert "synthetic" in picture.title and "with 2" in picture.alt and "with 5" in picture.alt
