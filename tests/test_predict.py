"""`levit-study predict` from outside: settings, places, bad scans, exit status."""
import csv
import errno
import json
import os
import resource
import shutil
import sys
from contextlib import contextmanager

import nibabel as nib
import numpy as np
import pytest
import torch

from levit_study.commands import main
from levit_study.data.phantom import make_phantom
from levit_study.evaluation.card import write_card
from levit_study.evaluation.inference import PredictionSettings, load_network
from levit_study.model.build import levit_unet
from levit_study.model.weights import save_weights

CARD = {"dataset": "toy", "loss": "baseline", "seed": 0, "synthetic": True, "window": None}
CARD |= {"structures": {"left ventricle": 1, "myocardium": 2}, "intensity": "minmax"}


@pytest.fixture(scope="module")
def network_file(tmp_path_factory):
    "Weights of a network that nobody trained: its labels differ from view to view"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    save_weights(path, levit_unet("128s", 3, image_size=32), **CARD)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch, network_file):
    "A folder to work in, with weights, a scan, and a folder of three"
    monkeypatch.chdir(tmp_path)
    shutil.copy(network_file, "best.safetensors")
    os.mkdir("scans")
    write_scan("scan.nii.gz")
    for seed, name in enumerate("abc"): write_scan(f"scans/{name}.nii.gz", seed)
    return tmp_path


def write_scan(path, seed=0, shape=(20, 24, 3)):
    voxels = np.random.default_rng(seed).random(shape).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.5, 1.5, 8, 1])), path)


def predict(capsys, *arguments, weights="best.safetensors"):
    "Run the command as a user would; return status, label maps printed, and standard error"
    fixed = "--weights", weights, "--device", "cpu", "--precision", "fp32"
    status = main(["predict", *map(str, arguments), *fixed])
    printed = capsys.readouterr()
    return status, printed.out.split(), printed.err


def refused(capsys, *arguments):
    "The error line of a command that must fail before it has written anything"
    before = snapshot()
    status, printed, err = predict(capsys, *arguments)
    assert status == 1 and printed == [] and snapshot() == before
    lines = [line for line in err.splitlines() if line.startswith("levit-study: error: ")]
    assert len(lines) == 1 and "Traceback" not in err and "predicting with" not in err
    return lines[0]


def snapshot():
    "Every file below the working folder with its content"
    files = [os.path.join(folder, name) for folder, _, names in os.walk(".") for name in names]
    return {file: open(file, "rb").read() for file in files if os.path.isfile(file)}


def evaluated_with(settings):
    "Write the card that an evaluation with these settings leaves beside the weights"
    write_card(load_network("best.safetensors", settings, "cpu", "fp32"), {"test_dice": .5}, 2.0)


def test_a_scan_gets_a_label_map_on_its_own_grid(place, capsys):
    status, printed, err = predict(capsys, "scan.nii.gz", "--output", "new/labels.nii.gz",
                                   "--volumes", "new/volumes.csv", "--overlay")
    assert (status, printed) == (0, ["new/labels.nii.gz"])
    assert "each slice once (no card.json beside the weights" in err
    scan, labels = nib.load("scan.nii.gz"), nib.load("new/labels.nii.gz")
    assert labels.shape == scan.shape and np.array_equal(labels.affine, scan.affine)
    about = json.load(open("new/labels.json"))
    assert about["labels"] == {"background": 0, **CARD["structures"]}
    row = next(csv.DictReader(open("new/volumes.csv")))
    voxels = np.asarray(labels.dataobj)
    for name, value in CARD["structures"].items():
        assert float(row[name]) == pytest.approx((voxels == value).sum() * .018, abs=6e-4)
        assert about["volumes_ml"][name] == pytest.approx(float(row[name]), abs=6e-4)
    assert open("new/labels.png", "rb").read(4) == b"\x89PNG"


def test_what_was_predicted_with_is_recorded(place, capsys):
    evaluated_with(PredictionSettings(flips=True, largest_regions=True))
    predict(capsys, "scan.nii.gz", "--output", "labels.nii")
    assert json.load(open("labels.json"))["predicted"] == {"flips": True, "zooms": [1.0], "largest_regions": True}


def test_a_card_of_other_weights_is_not_followed(place, capsys):
    evaluated_with(PredictionSettings(flips=True))
    torch.manual_seed(1)
    save_weights("best.safetensors", levit_unet("128s", 3, image_size=32), **CARD)
    status, _, err = predict(capsys, "scan.nii.gz", "--output", "labels.nii")
    assert status == 0 and "each slice once (card.json is of other weights" in err


def test_older_weights_carry_their_settings_in_the_header(place, capsys):
    header = CARD | {"evaluation": {"flips": True, "zooms": [1.0], "largest_regions": False}}
    save_weights("best.safetensors", levit_unet("128s", 3, image_size=32), **header)
    status, _, err = predict(capsys, "scan.nii.gz", "--output", "labels.nii")
    assert status == 0 and "predicting with mirrored slices (as the weights' header says)" in err


@pytest.mark.parametrize("content, message", [
    ("{", "card.json: cannot be read"),
    ("[" * 100_000, "card.json: cannot be read"),
    ("1" * 5000, "card.json: cannot be read"),
    ("[1]", "card.json: is not a card of an evaluation"),
    ('{"weights": null}', "card.json: is not a card of an evaluation"),
])
def test_a_damaged_card_is_named(place, capsys, content, message):
    open("card.json", "w").write(content)
    assert message in refused(capsys, "scan.nii.gz", "--output", "labels.nii")


@pytest.mark.parametrize("target", ["scan.nii.gz", "./scans/../scan.nii.gz", "hard.nii.gz",
                                    "soft.nii.gz", "loop/scan.nii.gz"])
@pytest.mark.parametrize("existing", [[], ["--overwrite"], ["--keep"]])
def test_a_scan_is_never_replaced(place, capsys, target, existing):
    os.link("scan.nii.gz", "hard.nii.gz")
    os.symlink("scan.nii.gz", "soft.nii.gz")
    os.symlink(".", "loop")
    line = refused(capsys, "scan.nii.gz", "--output", target, *existing)
    assert "is the same file as scan.nii.gz, which is read" in line


@pytest.mark.parametrize("arguments", [
    ("scan.nii.gz", "--output", "labels.nii", "--volumes", "scan.nii.gz"),
    ("scan.nii.gz", "--output", "labels.nii", "--volumes", "best.safetensors"),
    ("scan.nii.gz", "--output", "labels.nii", "--volumes", "card.json"),
    ("scan.nii.gz", "--output", "link.nii"),                 # link.json is the weights' card
    ("scan.nii.gz", "--output", "picture.nii", "--overlay"), # picture.png is the scan
    ("scans", "--output", "scans"),
    ("scans", "--output", "scans_link"),
    ("scans", "--output", "labels", "--volumes", "scans/b.nii.gz"),
])
def test_nothing_that_is_read_is_replaced(place, capsys, arguments):
    evaluated_with(PredictionSettings())
    os.symlink("card.json", "link.json")
    os.link("scan.nii.gz", "picture.png")
    os.symlink("scans", "scans_link")
    assert "is the same file as" in refused(capsys, *arguments, "--overwrite")


@pytest.mark.parametrize("arguments, message", [
    (("scans", "--output", "labels"), "this scan and a.nii would both be written to a.json"),
    (("scan.nii.gz", "--output", "x.nii", "--volumes", "x.json"), "has the same name"),
    (("scan.nii.gz", "--output", "x.nii", "--volumes", "./x.nii"), "has the same name"),
])
def test_two_results_never_share_a_name(place, capsys, arguments, message):
    write_scan("scans/a.nii")
    assert message in refused(capsys, *arguments)


def test_existing_results_are_kept_unless_the_user_says_otherwise(place, capsys):
    for name in ("labels.nii", "labels.json", "volumes.csv"):
        open(name, "w").write("mine")
        arguments = "scan.nii.gz", "--output", "labels.nii", "--volumes", "volumes.csv"
        assert f"{name}: exists already" in refused(capsys, *arguments)
        os.remove(name)
    open("labels.nii", "w").write("mine")
    assert predict(capsys, *arguments, "--overwrite")[0] == 0
    assert nib.load("labels.nii").shape == (20, 24, 3)


def test_a_folder_goes_on_where_it_was_stopped(place, capsys):
    assert predict(capsys, "scans", "--output", "labels")[0] == 0
    first = snapshot()
    os.remove("labels/b.nii.gz")
    status, printed, _ = predict(capsys, "scans", "--output", "labels", "--keep")
    assert status == 0 and len(printed) == 3 and snapshot() == first
    status, _, err = predict(capsys, "scans", "--output", "labels", "--keep", "--flips")
    assert status == 1 and "3 of 3 scans could not be segmented" in err and snapshot() == first


def test_a_folder_inside_the_scans_folder_is_a_place_like_any(place, capsys):
    for _ in range(2):
        options = "--output", "scans/labels", "--overwrite"
        status, printed, _ = predict(capsys, "scans", *options)
        assert status == 0 and len(printed) == 3


@pytest.mark.parametrize("target", ["scan.nii.gz/labels.nii", "/proc/none/labels.nii",
                                    "dangling/labels.nii", f"{'long' * 70}.nii"])
@pytest.mark.parametrize("option", ["--output", "--volumes"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(place, capsys, target, option):
    os.symlink("nowhere", "dangling")
    output = [] if option == "--output" else ["--output", "labels.nii"]
    line = refused(capsys, "scan.nii.gz", *output, option, target)
    assert f"error: {target}: cannot be written" in line


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_folders_that_take_no_file_are_found_before_the_work(place, capsys, monkeypatch, code):
    "Root writes where others may not, so the system's answer is imitated"
    import builtins
    true_open = builtins.open

    def answer(path, mode="r", *others, **named):
        if "x" in mode: raise OSError(code, os.strerror(code), str(path))
        return true_open(path, mode, *others, **named)
    monkeypatch.setattr(builtins, "open", answer)
    line = refused(capsys, "scans", "--output", "labels")
    assert f"labels/a.nii.gz: cannot be written ({os.strerror(code)})" in line


@contextmanager
def files_limited_to(size):
    "The system refuses to write more than `size` bytes to a file: as a full disk does"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_is_named_and_leaves_nothing_half_done(place, capsys):
    os.remove("scans/b.nii.gz")
    write_scan("scans/b.nii", shape=(64, 64, 4))   # its label map, not compressed, is too large
    with files_limited_to(6000):
        status, _, err = predict(capsys, "scans", "--output", "out")
    assert status == 1 and "1 of 3 scans could not be segmented: out/b.nii: cannot be" in err
    written = sorted(os.listdir("out"))
    assert written == ["a.json", "a.nii.gz", "c.json", "c.nii.gz"]


def test_bad_scans_cost_the_others_nothing(place, capsys, monkeypatch):
    from levit_study.evaluation import predict as room
    write_scan("scans/four_axes.nii.gz", shape=(20, 24, 3, 2))
    open("scans/damaged.nii.gz", "wb").write(b"\x1f\x8b damaged")
    write_scan("scans/header.nii.gz")
    header = bytearray(nib.load("scans/header.nii.gz").to_bytes())
    header[252:254] = (1).to_bytes(2, "little")                     # qform_code
    header[256:268] = np.float32([1, 1, 1]).tobytes()               # b, c, d: no unit quaternion
    open("scans/header.nii", "wb").write(header)
    os.remove("scans/header.nii.gz")
    true_read = room.read_scan

    def read(path, *others):
        if path.name == "b.nii.gz": raise KeyError("surprise")
        return true_read(path, *others)
    monkeypatch.setattr(room, "read_scan", read)
    options = "--output", "labels", "--volumes", "volumes.csv"
    status, _, err = predict(capsys, "scans", *options)
    line = err.splitlines()[-1]
    assert status == 1 and "Traceback" not in err and line.startswith("levit-study: error: ")
    assert "scans/b.nii.gz: KeyError: 'surprise'" in line
    assert "scans/damaged.nii.gz: " in line and "scans/four_axes.nii.gz: 4D" in line
    segmented = {row["scan"] for row in csv.DictReader(open("volumes.csv"))}
    assert {"a.nii.gz", "c.nii.gz"} <= segmented <= {"a.nii.gz", "c.nii.gz", "header.nii"}
    assert f"{6 - len(segmented)} of 6 scans could not be segmented" in line
    assert ("header.nii" in segmented) != ("scans/header.nii" in line)


def test_a_picture_that_fails_is_named(place, capsys, monkeypatch):
    from levit_study.report import overlay

    def fail(path, *others): raise MemoryError
    monkeypatch.setattr(overlay, "draw_overlay", fail)
    options = "--output", "labels.nii", "--overlay"
    status, _, err = predict(capsys, "scan.nii.gz", *options)
    assert status == 1 and "levit-study: error: scan.nii.gz: MemoryError" in err


def test_no_older_picture_stays_beside_a_new_label_map(place, capsys, monkeypatch):
    from levit_study.report import overlay
    options = "--output", "labels.nii", "--overlay"
    assert predict(capsys, "scan.nii.gz", *options)[0] == 0 and os.path.exists("labels.png")
    true_draw = overlay.draw_overlay

    def fail(path, *others): raise MemoryError
    monkeypatch.setattr(overlay, "draw_overlay", fail)
    write_scan("scan.nii.gz", 5)
    assert predict(capsys, "scan.nii.gz", *options, "--overwrite")[0] == 1
    assert os.path.exists("labels.nii") and not os.path.exists("labels.png")
    monkeypatch.setattr(overlay, "draw_overlay", true_draw)
    assert predict(capsys, "scan.nii.gz", *options, "--keep")[0] == 0 and os.path.exists("labels.png")


def test_debug_shows_where_a_scan_failed(place, monkeypatch):
    from levit_study.evaluation import predict as room
    monkeypatch.setattr(room, "read_scan", lambda *_: 1 / 0)
    command = ["--debug", "predict", "scan.nii.gz", "--weights", "best.safetensors"]
    with pytest.raises(ValueError) as caught: main([*command, "--output", "labels.nii"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("name, head, converter", [
    ("scan.nrrd", b"NRRD0004\n", "NIfTI"),
    ("series/IM0001", b"\0" * 128 + b"DICM", "dcm2niix"),
])
def test_other_formats_are_named_with_a_converter(place, capsys, name, head, converter):
    os.makedirs("series")
    open(name, "wb").write(head + b"\0" * 64)
    scans = name.split("/")[0]
    output = "labels" if scans == "series" else "labels.nii"
    line = refused(capsys, scans, "--output", output)
    assert name in line and converter in line and "convert it" in line


def network(path, seed=1, **changes):
    "Another network's weights"
    torch.manual_seed(seed)
    size = changes.pop("size", 32)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_weights(path, levit_unet("128s", 3, image_size=size), **CARD | {"seed": seed} | changes)
    return path


def test_a_folder_of_runs_is_the_mean_of_its_networks(place, capsys):
    for seed in (0, 1, 2): network(f"runs/seed{seed}/best.safetensors", seed)
    asked = "--output", "mean.nii.gz", "--probabilities", "--uncertainty"
    status, printed, _ = predict(capsys, "scan.nii.gz", *asked, weights="runs")
    assert status == 0 and printed == ["mean.nii.gz"]
    by_hand = 0
    for seed in (0, 1, 2):
        member = f"runs/seed{seed}/best.safetensors"
        predict(capsys, "scan.nii.gz", "--output", f"{seed}.nii.gz", "--probabilities", weights=member)
        by_hand = by_hand + nib.load(f"{seed}_maps/myocardium.nii.gz").get_fdata() / 3
    mean = nib.load("mean_maps/myocardium.nii.gz")
    assert np.abs(mean.get_fdata() - by_hand).max() <= 1.01 / 255 and mean.get_data_dtype() == np.uint8
    about = json.load(open("mean.json"))
    assert [member["seed"] for member in about["model"]["ensemble"]] == [0, 1, 2]
    assert about["maps"] == {"files": ["left_ventricle", "myocardium", "uncertainty"], "temperature": None}
    status, _, _ = predict(capsys, "scan.nii.gz", *asked, "--keep", weights="runs")
    assert status == 0
    network("runs/seed3/best.safetensors", 3)   # another ensemble's label map is not kept as this one's
    status, _, err = predict(capsys, "scan.nii.gz", *asked, "--keep", weights="runs")
    assert status == 1 and "mean.nii.gz: kept, but mean.json does not say" in err


@pytest.mark.parametrize("changes, message", [
    ({"structures": {"liver": 1, "spleen": 2}}, "structures liver, spleen, where best.safetensors has left ventricle, myocardium"),
    ({"size": 64}, "size [64, 64], where best.safetensors has [32, 32]"),
    ({"crop": 0.8}, "crop 0.8, where best.safetensors has None"),
    ({"intensity": "unit"}, "intensity unit, where best.safetensors has minmax"),
])
def test_networks_for_other_images_make_no_ensemble(place, capsys, changes, message):
    other = network("other/best.safetensors", **changes)
    before = snapshot()
    status = main(["predict", "scan.nii.gz", "--weights", "best.safetensors", other, "--output", "x.nii", "--device", "cpu"])
    err = capsys.readouterr().err.splitlines()
    assert status == 1 and snapshot() == before and len(err) == 1 and f"error: {other}: {message}" in err[0]


def test_no_map_replaces_what_is_there(place, capsys):
    os.mkdir("labels_maps")
    open("labels_maps/uncertainty.nii.gz", "w").close()
    assert "labels_maps/uncertainty.nii.gz: exists already" in refused(capsys, "scan.nii.gz", "--output", "labels.nii", "--uncertainty")


def test_an_ensemble_holds_one_network_at_a_time(place, capsys, monkeypatch):
    import gc
    import weakref
    from levit_study.evaluation import ensemble as room
    alive, most, true_load = weakref.WeakSet(), [], room.load_network

    def load(*arguments):
        gc.collect()
        most.append(len(alive))
        loaded = true_load(*arguments)
        alive.add(loaded.model)
        return loaded
    monkeypatch.setattr(room, "load_network", load)
    for seed in range(4): network(f"runs/seed{seed}/best.safetensors", seed)
    assert predict(capsys, "scan.nii.gz", "--output", "mean.nii", weights="runs")[0] == 0
    assert most == [0, 0, 0, 0]


def in_int8(capsys, *arguments):
    "Run the command with OpenVINO; return its status and the last line of standard error"
    fixed = "--weights", "best.safetensors", "--engine", "openvino", "--overwrite"
    status = main(["predict", "scan.nii.gz", "--output", "int8.nii.gz", *fixed, *arguments])
    return status, capsys.readouterr().err.splitlines()[-1]


def test_openvino_says_what_it_is_not_for(place, capsys, monkeypatch):
    assert in_int8(capsys, "--precision", "bf16") == (1, "levit-study: error: --engine openvino: predicts in int8; leave --precision out")
    assert "predicts on the CPU, not on 'cuda'" in in_int8(capsys, "--device", "cuda")[1]
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "needs the package openvino; run make openvino" in in_int8(capsys)[1]


def test_openvino_is_checked_against_the_network_and_kept(place, capsys, monkeypatch):
    pytest.importorskip("nncf", reason="an optional extra: levit-study[openvino]")
    from levit_study.evaluation import engine as room
    monkeypatch.setattr(room, "LEAST_AGREEMENT", 0)
    assert in_int8(capsys)[0] == 0
    kept, = place.glob("best.*.openvino-*.zip")
    written, labels = kept.stat().st_mtime_ns, nib.load("int8.nii.gz").get_fdata()
    assert json.loads(open("int8.json").read())["model"]["engine"]["precision"] == "int8"
    assert in_int8(capsys)[0] == 0 and kept.stat().st_mtime_ns == written
    assert (nib.load("int8.nii.gz").get_fdata() == labels).all()
    monkeypatch.setattr(room, "LEAST_AGREEMENT", 1.1)   # more than any network reaches
    assert "110% are asked; leave the engine out" in in_int8(capsys)[1]
    kept.write_text("a user's own")
    assert "is not an engine" in in_int8(capsys)[1] and kept.read_text() == "a user's own"


def test_the_network_that_comes_with_the_project_segments_a_heart_it_never_saw(tmp_path, monkeypatch, root):
    "Trained on patients alone; a synthetic heart is the one that tests may hold"
    make_phantom(tmp_path, "mr", cases=1, shape=(8, 160, 160))
    scan = next(tmp_path.rglob("*_frame01.nii.gz"))
    monkeypatch.chdir(root)
    assert main(["predict", str(scan)]) in (None, 0)
    labels, reference = (np.asarray(nib.load(str(scan).replace(".nii", f"_{name}.nii")).dataobj) for name in ("labels", "gt"))
    dice = [2 * ((labels == k) & (reference == k)).sum() / ((labels == k).sum() + (reference == k).sum()) for k in (1, 2, 3)]
    assert dice[0] > .5 and dice[1] > .75 and dice[2] > .9


def test_a_kept_label_map_is_of_the_same_scan(place, capsys):
    assert predict(capsys, "scans", "--output", "labels")[0] == 0
    write_scan("scans/b.nii.gz", 9)
    status, _, err = predict(capsys, "scans", "--output", "labels", "--keep")
    assert status == 1 and "b.json does not say that it comes from this scan" in err and "1 of 3" in err
    side = json.loads(open("labels/a.json").read())
    with open("labels/a.json", "w") as file: json.dump(side | {"volumes_ml": {}}, file)
    status, _, err = predict(capsys, "scans", "--output", "labels", "--keep")
    assert status == 1 and "2 of 3" in err and "KeyError" not in err


def test_weights_that_are_not_finite_are_refused(place, capsys):
    model = levit_unet("128s", 3, image_size=32)
    with torch.no_grad(): next(model.parameters()).view(-1)[0] = float("nan")
    save_weights("best.safetensors", model, **CARD)
    status, _, err = predict(capsys, "scan.nii.gz", "--output", "labels.nii.gz")
    assert status == 1 and "numbers that are not finite" in err and not os.path.exists("labels.nii.gz")


@pytest.mark.parametrize("network", ["payload.Net", "torch.hub.load"])
def test_the_network_that_a_weight_file_names_is_not_imported(place, capsys, network):
    with open("payload.py", "w") as file: file.write("open('imported', 'w').close()\n")
    save_weights("best.safetensors", levit_unet("128s", 3, image_size=32), **CARD, network=network, settings={}, variant=None)
    status, _, err = predict(capsys, "scan.nii.gz", "--output", "labels.nii.gz")
    assert status == 1 and "code that a file may not choose" in err and not os.path.exists("imported")


def test_a_card_of_a_huge_network_allocates_none(place, capsys):
    huge = {"network": "unet", "settings": {"widths": [4096] * 6}, "variant": None}
    save_weights("best.safetensors", levit_unet("128s", 3, image_size=32), **CARD, **huge)
    status, _, err = predict(capsys, "scan.nii.gz", "--output", "labels.nii.gz")
    assert status == 1 and "tensors do not fit a U-Net model" in err
