"""Several channels and neighbouring slices from raw files to new scans: a heart phantom with a second contrast, in nnU-Net's and the Decathlon's form."""
import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from levit_study.data.dataset import PreparedStore
from levit_study.data.labels import acdc_structures
from levit_study.data.layouts import find_cases
from levit_study.data.phantom import make_phantom
from levit_study.data.prepare import prepare
from levit_study.data.volumes import read_volume
from levit_study.evaluation.evaluate import evaluate
from levit_study.evaluation.inference import load_network
from levit_study.evaluation.predict import predict
from levit_study.evaluation.targets import Outputs, Scans
from levit_study.files import StudyError
from levit_study.model.weights import read_card
from levit_study.params import Data, Model, Run, Training, load_params
from levit_study.training.fit import fit

NAMES = ["cine", "late"]


def two_channels(folder, together=False):
    "Write the phantom's hearts with a second contrast, reversed and shaded; `together`: on a fourth axis"
    make_phantom(folder/"made", "mr", 4, (4, 40, 40))
    for path in sorted((folder/"made").rglob("*_frame01.nii.gz")):
        name, image = path.name.split("_")[0], nib.load(path)
        first = np.asarray(image.dataobj).astype(np.float32)
        second = first.max() - first + np.linspace(0, first.max()/4, first.shape[1])[:, None]
        (folder/"set/imagesTr").mkdir(parents=True, exist_ok=True)
        (folder/"set/labelsTr").mkdir(exist_ok=True)
        if together: nib.save(nib.Nifti1Image(np.stack([first, second], -1), image.affine), folder/f"set/imagesTr/{name}.nii.gz")
        else:
            for k, part in enumerate((first, second)): nib.save(nib.Nifti1Image(part, image.affine), folder/f"set/imagesTr/{name}_{k:04d}.nii.gz")
        label = path.with_name(path.name.replace(".nii.gz", "_gt.nii.gz"))
        (folder/f"set/labelsTr/{name}.nii.gz").write_bytes(label.read_bytes())
    key = "modality" if together else "channel_names"
    (folder/"set/dataset.json").write_text(json.dumps({key: {"0": "cine", "1": "late"}, "labels": {"background": 0}}))
    return folder/"set"


def settings(folder, **changes):
    about = {"layout": "decathlon", "structures": acdc_structures, "size": 64, "channels": NAMES, "intensity": {"cine": "minmax", "late": "percentile"},
             "split": {"kind": "fraction", "valid": 0.25, "test": 0.25}}
    return Data(folder=str(folder), **about | changes)


@pytest.fixture(scope="module")
def hearts(tmp_path_factory):
    "Raw files, their settings, and the prepared store"
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("channels")
    data = settings(two_channels(folder))
    prepare(data, folder/"hearts.h5", folder/"manifest.json", progress=False)
    return folder, data


@pytest.fixture(scope="module")
def trained(hearts):
    "Late fusion of two channels with the slices above and below, two epochs"
    folder, data = hearts
    data = data.model_copy(update={"context": 1})
    run = Run(dataset="hearts", loss="baseline", seed=0, data=data, model=Model(variant="128s", fusion="late"),
              training=Training(epochs=2, batch_size=4, augmentation="strong", precision="fp32"), loss_settings={"kind": "baseline"})
    fit(run, folder/"hearts.h5", folder/"reports", folder/"models", device="cpu", progress=False, say=lambda line: None)
    return folder/"models/best.safetensors"


def test_the_store_holds_each_channel_scaled_by_itself(hearts):
    folder, data = hearts
    store = PreparedStore(folder/"hearts.h5")
    images, labels = store.slices([0, 1])
    assert store.channels == NAMES and images.shape == (2, 2, 64, 64) and labels.shape == (2, 64, 64)
    assert store.tables["cases/histogram"].shape[1:] == (2, 4, 64)
    seen, _ = store.load("train", context=1).batch([0, 1])
    disk, _ = store.load("train", limit_bytes=0, context=1).batch([0, 1])
    assert seen.shape == (2, 6, 64, 64) and torch.equal(seen, disk)
    assert torch.equal(seen[0, 0], seen[0, 1]) and torch.equal(seen[0, 2], seen[1, 1])   # the first slice stands in for the one below


def test_context_prepares_nothing_again(hearts):
    folder, data = hearts
    before = (folder/"hearts.h5").read_bytes()
    prepare(data.model_copy(update={"context": 2, "shown_channel": "late"}), folder/"hearts.h5", folder/"manifest.json", progress=False)
    assert (folder/"hearts.h5").read_bytes() == before


def test_both_forms_are_the_same_volumes(hearts, tmp_path):
    folder, data = hearts
    files, axis = (find_cases(place, channels=["late", "cine"]) for place in (data.folder, two_channels(tmp_path, together=True)))
    for one, other in zip(files, axis, strict=True):
        one, other = (read_volume(case, "minmax", structures=acdc_structures) for case in (one, other))
        assert one.image.ndim == 4 and np.array_equal(one.image, other.image) and np.array_equal(one.label, other.label)
    alone = read_volume(find_cases(data.folder, channels=["late"])[0], "minmax", structures=acdc_structures)
    assert np.array_equal(alone.image, read_volume(files[0], "minmax", structures=acdc_structures).image[:, 0])


def test_a_training_is_evaluated_and_predicts_from_files_or_a_fourth_axis(hearts, trained, tmp_path):
    folder, data = hearts
    card = read_card(trained)
    assert (card["in_channels"], card["encoders"], card["channels"], card["context"]) == (6, 2, NAMES, 1)
    cases, _ = evaluate(PreparedStore(folder/"hearts.h5"), load_network(trained, device="cpu"), progress=False)
    assert cases.dice.notna().any()
    files = [f"{data.folder}/imagesTr/patient001_{k:04d}.nii.gz" for k in range(2)]
    predict(Scans(files), [trained], Outputs(tmp_path/"files.nii.gz"), device="cpu", progress=False)
    axis = two_channels(tmp_path, together=True)/"imagesTr/patient001.nii.gz"
    predict(Scans(axis), [trained], Outputs(tmp_path/"axis.nii.gz"), device="cpu", progress=False)
    written = predict(Scans(f"{data.folder}/imagesTr"), [trained], Outputs(tmp_path/"all"), device="cpu", progress=False)
    maps = [np.asarray(nib.load(path).dataobj) for path in (tmp_path/"files.nii.gz", tmp_path/"axis.nii.gz", written[0])]
    assert len(written) == 4 and all(np.array_equal(maps[0], other) for other in maps[1:])


@pytest.mark.parametrize("wrong, message", [("grid", "0001.nii.gz: lies up to .* beside the grid"), ("one", "3D array .* where 4D is expected"),
                                            ("thin", "has 2 slices, the network sees 3")])
def test_scans_that_do_not_fit_are_refused(hearts, trained, tmp_path, wrong, message):
    files = [f"{hearts[1].folder}/imagesTr/patient001_{k:04d}.nii.gz" for k in range(2)]
    for k, path in enumerate(files):
        image = nib.load(path)
        affine, array = image.affine.copy(), np.asarray(image.dataobj)
        if wrong == "grid" and k: affine[2, 3] += 20
        files[k] = tmp_path/f"a_{k:04d}.nii.gz"
        nib.save(nib.Nifti1Image(array[..., :2] if wrong == "thin" else array, affine), files[k])
    with pytest.raises(StudyError, match=message):
        predict(Scans(files[0] if wrong == "one" else files), [trained], Outputs(tmp_path/"x.nii.gz"), device="cpu", progress=False)


def test_a_context_wider_than_a_stack_is_refused(hearts):
    with pytest.raises(StudyError, match="case patient00.: has 4 slices, data.context = 3"):
        PreparedStore(hearts[0]/"hearts.h5").load("train", context=3)


@pytest.mark.parametrize("spoil, message", [
    (lambda f: (f/"imagesTr/patient002_0001.nii.gz").unlink(), "patient002_0001.nii.gz: absent, the channel late of case patient002: add it"),
    (lambda f: (f/"imagesTr/patient002_0001.nii").write_bytes(b""), "a second file for the channel late of case patient002: keep one"),
])
def test_a_channel_missing_or_twice_is_the_cases_problem(tmp_path, spoil, message):
    folder = two_channels(tmp_path)
    spoil(folder)
    problems = [case.problem for case in find_cases(folder, channels=NAMES) if case.problem]
    assert len(problems) == 1 and re.search(message, problems[0])


@pytest.mark.parametrize("change, message", [
    ({"channels": ["T2", "t2"]}, "a channel is named twice"), ({"intensity": {"T2": "minmax"}}, "data.channels has none"),
    ({"shown_channel": "ADC"}, "none of data.channels"), ({"context": -1}, "context"),
])
def test_params_say_what_is_wrong_with_channels(root, change, message):
    from ruamel.yaml import YAML
    content = YAML(typ="safe").load((root/"tests/params.yaml").read_text())
    content["datasets"]["acdc"]["data"] |= change
    with pytest.raises(StudyError, match=message): load_params(content)


@pytest.mark.parametrize("text, message", [
    ("study: {title: 2020-13-45}", "month must be in 1..12"), ("study: !!int x", "not readable as YAML"),
    ("study: " + "1" * 5000, "not readable as YAML"), ("[" * 20_000, "nested too deeply"), (None, "cannot be read .Is a directory"),
    ("study: {title: &a [" + "x, " * 9 + "x]}\nlosses: {b: {kind: &b [" + "*a, " * 9 + "*a]}, c: {kind: &c [" + "*b, " * 9 + "*b]}, d: {kind: &d ["
     + "*c, " * 9 + "*c]}}\ndatasets: {e: {title: [*d, *d, *d, *d, *d, *d]}}\n", r"title = \[.*"),
], ids=["date", "int", "digits", "nested", "folder", "aliases"])
def test_a_file_that_is_no_params_is_one_line(tmp_path, text, message):
    path = tmp_path/"params.yaml"
    path.write_text(text) if text else path.mkdir()
    with pytest.raises(StudyError, match=message) as caught: load_params(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 and str(path) in str(caught.value)


@pytest.mark.parametrize("form, message", [
    ({"labels": {"background": 0, "Myocardium": [1, 2]}}, "'myocardium' is a region of the labels 1, 2"),
    ({"file_ending": ".png"}, "file_ending '.png': scans are read as NIfTI"),
    ({"channel_names": {"0": "cine", "1": "late", "2": "LATE"}}, "names channel 'late' twice"),
    ({"channel_names": {"²": "cine", "1": "late"}}, "numbers no channel 0, 1"),
    ({"channel_names": {"1" * 5000: "cine", "1": "late"}}, "numbers no channel 0, 1"),
])
def test_a_form_that_is_not_read_is_one_line(tmp_path, form, message):
    folder = two_channels(tmp_path)
    about = json.loads((folder/"dataset.json").read_text())
    (folder/"dataset.json").write_text(json.dumps(about | form))
    with pytest.raises(StudyError, match=message) as caught:
        prepare(settings(folder), tmp_path/"x.h5", tmp_path/"manifest.json", progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spoil, message", [
    (lambda image: nib.Nifti1Image(np.asarray(image.dataobj), image.affine + np.diag([0, 0, 9, 0])), "lies up to .* beside the grid"),
    (lambda image: nib.Nifti1Image(np.zeros(image.shape, [(c, "u1") for c in "RGB"]), image.affine), "colour to grey or channels"),
])
def test_a_channel_that_does_not_fit_stops_the_preparation(tmp_path, spoil, message):
    folder = two_channels(tmp_path)
    path = folder/"imagesTr/patient002_0001.nii.gz"
    nib.save(spoil(nib.load(path)), path)
    with pytest.raises(StudyError, match=message):
        prepare(settings(folder), tmp_path/"x.h5", tmp_path/"manifest.json", progress=False)


@pytest.mark.parametrize("change, message", [
    ({"freeze_encoder_epochs": 2}, "acdc.training.freeze_encoder_epochs = 2: model.pretrained is false"),
    ({"freeze_encoder_epochs": 99, "pretrained": "w.pth"}, "= 99: the training has 30 epochs"),
    ({"freeze_encoder_epochs": 2, "pretrained": "w.pth", "network": "unet"}, "does not say what its encoder is"),
    ({"train_patients": 0}, "train_patients"),
])
def test_params_say_what_is_wrong_with_a_transfer(root, change, message):
    from ruamel.yaml import YAML
    content = YAML(typ="safe").load((root/"tests/params.yaml").read_text())
    content["study"]["datasets"] = ["acdc"]
    about = content["datasets"]["acdc"]
    about["training"] |= {key: change[key] for key in change if key == "freeze_encoder_epochs"}
    about["data"]["split"] |= {key: change[key] for key in change if key == "train_patients"}
    about["model"] = {key: change.get(key, value) for key, value in (("network", "levit_unet"), ("pretrained", False))}
    with pytest.raises(StudyError, match=message): load_params(content)


def test_late_fusion_needs_channels(root):
    from ruamel.yaml import YAML
    content = YAML(typ="safe").load((root/"tests/params.yaml").read_text())
    content["datasets"]["acdc"]["model"]["fusion"] = "late"
    with pytest.raises(StudyError, match="needs two or more data.channels"): load_params(content)
