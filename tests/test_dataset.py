"""The prepared store under trouble: interruption, full disk, killed processes, damaged files; augmentation held to SciPy and NumPy."""
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import nibabel as nib
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levit_study.data import augment as augmenting, jobs as planning, prepare as preparing
from levit_study.data.slices import labels_to_square, to_square
from levit_study.data.augment import augment
from levit_study.data.dataset import PreparedStore, epoch_order
from levit_study.data.prepare import prepare
from levit_study.data.fingerprint import fingerprint
from levit_study.data.native import stored_volume
from levit_study.files import StudyError, hash_file
from levit_study.recipes import augmentation
from levit_study.params import Data
from scipy import ndimage

STRUCTURES = {"myocardium": 1, "left ventricle": 2}


def write_scan(folder, number, slices=5, seed=0, side=48):
    """One patient in ACDC's layout: two frames of two unlike boxes in noise, stored as (x, y, z)."""
    name, random = f"patient{number:03d}", np.random.default_rng([seed, number])
    (folder / "training" / name).mkdir(parents=True)
    (folder / "training" / name / "Info.cfg").write_text(f"ED: 1\nES: 9\nGroup: {('NOR', 'DCM')[number % 2]}\n")
    for frame in (1, 9):
        label = np.zeros((side, side + 6, slices), np.uint8)
        label[10:30, 12:20, 1:4], label[14:20, 30:40, 2:4] = 1, 2
        image = (random.normal(200, 40, label.shape) + 300 * (label == 2)).clip(0).astype(np.int16)
        for array, end in ((image, ""), (label, "_gt")):
            nib.save(nib.Nifti1Image(array, np.diag([-1.5, -1.5, 8, 1])), folder / "training" / name / f"{name}_frame{frame:02d}{end}.nii.gz")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    for number in range(1, 7): write_scan(folder, number)
    return folder


def settings_of(folder, **changes):
    split = {"kind": "fraction", "valid": 0.2, "test": 0.2}
    return Data(folder=str(folder), structures=STRUCTURES, intensity="minmax", size=64, split=changes.pop("split", split), **changes)


@pytest.fixture(scope="module")
def store(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(settings_of(raw), folder / "a.h5", folder / "a.json", workers=1, progress=False)
    return folder / "a.h5"


def test_processes_do_not_change_a_byte(raw, store, tmp_path):
    prepare(settings_of(raw), tmp_path / "a.h5", tmp_path / "a.json", workers=2, progress=False)
    for name in ("a.h5", "a.json", "splits.csv"): assert (tmp_path / name).read_bytes() == (store.parent / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "a.json", "splits.csv"]


def test_values_survive(raw, store):
    opened = PreparedStore(store)
    name = opened.split("test")[0]
    volume, source = stored_volume(opened, name), nib.load(next(raw.rglob(f"{name}.nii.gz")))
    array = np.asarray(source.dataobj, np.float32).T
    assert volume.spacing == (8, 1.5, 1.5)
    np.testing.assert_allclose(volume.affine @ [1, 2, 3, 1], source.affine @ [3, 2, 1, 1])
    np.testing.assert_allclose(volume.image, (array - array.min()) / np.ptp(array), atol=0.5 / 65535 + 1e-6)
    own = opened.tables["slices/case"] == opened.cases.index(name)
    images, labels = opened.slices(np.flatnonzero(own))
    assert np.abs(images / 255 - to_square(volume.image, 64, None).numpy()).max() <= 1 / 510 + 2e-5
    assert set(np.unique(labels)) == {0, 1, 2}
    np.testing.assert_array_equal(labels, labels_to_square(volume.label, 64, None))
    assert ((labels[2] > 0) == (to_square(volume.label[2:3] > 0, 64, None)[0].numpy() > 0.5)).mean() > 0.999  # labels lie where the image does
    counted = opened.tables["cases/voxels"][opened.cases.index(name)]
    np.testing.assert_array_equal(counted, np.bincount(volume.label.ravel(), minlength=3))


def test_patients_stay_whole(store):
    opened = PreparedStore(store)
    places = dict(zip(opened.text("cases/patient"), opened.text("cases/split"), strict=True))
    for name in ("train", "valid", "test"):
        assert all(places[case.split("_")[0]] == name for case in opened.split(name)) and opened.split(name)
    text = (store.parent / "splits.csv").read_text().splitlines()
    assert text[0] == "case,patient,group,split,slices" and len(text) == 13 and text[1].startswith("patient001_frame01,patient001,DCM,")


def test_manifest(raw, store):
    record = json.loads((store.parent / "a.json").read_text())
    assert record["slices"]["all"] == 60 and sum(record["patients"].values()) == 6 and record["skipped"] == []
    entry = record["cases"]["patient003_frame01"]
    assert sum(entry["voxels"].values()) == 5 * 48 * 54 and list(entry["voxels"]) == ["background", "myocardium", "left ventricle"]
    assert [file["path"] for file in entry["files"]] == [f"training/patient003/patient003_frame01{end}.nii.gz" for end in ("", "_gt")]
    assert str(raw.parent) not in json.dumps(record)
    assert record["cases"]["patient003_frame01"]["files"][0]["sha256"] == hash_file(raw / "training/patient003/patient003_frame01.nii.gz")


def test_only_what_is_new_is_prepared(raw, tmp_path, monkeypatch):
    folder = tmp_path / "raw"
    for number in range(1, 6): write_scan(folder, number)
    done, original = [], preparing.prepare_case
    monkeypatch.setattr(preparing, "prepare_case", lambda case, *rest: (done.append(case.name), original(case, *rest)))
    def run(**changes):
        done.clear()
        prepare(settings_of(folder, **changes), tmp_path / "a.h5", tmp_path / "a.json", workers=1, progress=False)
        return len(done)
    every = {"kind": "fraction", "valid": 0.2, "test": 0.0}
    assert run(split=every) == 10
    before = (tmp_path / "a.h5").read_bytes()
    assert run(split=every) == 0 and (tmp_path / "a.h5").read_bytes() == before
    (tmp_path / "a.json").unlink()             # as DVC does before it runs the stage
    assert run(split=every) == 0 and (tmp_path / "a.h5").read_bytes() == before
    os.utime(folder / "training/patient001/Info.cfg")  # a new date is no new content
    assert run(split=every) == 0
    write_scan(folder, 9)
    assert 2 <= run(split=every) <= 6  # the new patient, and one that changes places and so gains or loses its volume
    assert run(split=every, label_map={2: 1, 1: 2}) == 12
    for room in (planning, preparing): monkeypatch.setattr(room, "code_digest", lambda: "another")
    assert run(split=every, label_map={2: 1, 1: 2}) == 12


def test_another_split_reads_what_it_must(raw, tmp_path, monkeypatch):
    "Cases are known by their files, not by their splits: only volumes that were not kept are read, once"
    done, original = [], preparing.prepare_case
    monkeypatch.setattr(preparing, "prepare_case", lambda case, *rest: (done.append(case.name), original(case, *rest)))
    def run(seed, **changes):
        done.clear()
        split = {"kind": "fraction", "valid": 0.2, "test": 0.2, "seed": seed}
        record = prepare(settings_of(raw, split=split, **changes), tmp_path / "a.h5", tmp_path / "a.json", workers=1, progress=False)
        return {name for name, case in record["cases"].items() if case["split"] != "train"}, set(done)
    first, read = run(0)
    assert len(read) == 12
    second, read = run(1)
    assert read == second - first and read
    assert run(1) == (second, set())
    every, read = run(1, keep_training_volumes=True)
    assert read | second == set(PreparedStore(tmp_path / "a.h5").file["volumes"]) and len(read) == 12 - len(second)
    assert run(2, keep_training_volumes=True)[1] == set()


def test_other_pixels_are_other_data(raw, tmp_path, monkeypatch):
    "What a training knows its data by changes with what was read, and not with the code that read it"
    from levit_study.data import volumes
    scaled, known = volumes.scale_intensity, []
    for number, (code, read) in enumerate([("a", scaled), ("b", scaled), ("c", lambda *arguments: 1 - scaled(*arguments))]):
        for room in (planning, preparing): monkeypatch.setattr(room, "code_digest", lambda code=code: code)
        monkeypatch.setattr(volumes, "scale_intensity", read)
        prepare(settings_of(raw), tmp_path / f"{number}.h5", tmp_path / f"{number}.json", workers=1, progress=False)
        known.append(PreparedStore(tmp_path / f"{number}.h5").attributes["manifest"])
    assert known[0] == known[1] != known[2]


def test_two_scans_of_one_patient_stay_together(tmp_path):
    "Names of a data set's own; sessions as BIDS names them are known"
    for number in range(12): write_scan(tmp_path / "acdc", number)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/dataset.json").write_text(json.dumps({"labels": {"background": 0, "a": 1}}))
    for place in ("imagesTr", "labelsTr"): (tmp_path / "raw" / place).mkdir()
    for number, name in enumerate(f"P{n}_visit{k}" for n in range(6) for k in (1, 2)):
        scan = tmp_path / f"acdc/training/patient{number:03d}/patient{number:03d}_frame01"
        (tmp_path / f"raw/imagesTr/{name}.nii.gz").symlink_to(f"{scan}.nii.gz")
        (tmp_path / f"raw/labelsTr/{name}.nii.gz").symlink_to(f"{scan}_gt.nii.gz")
    def patients(**changes):
        record = prepare(settings_of(tmp_path / "raw", **changes), tmp_path / "a.h5", tmp_path / "a.json", workers=1, progress=False)
        splits = {}
        for name, case in record["cases"].items(): splits.setdefault(name.split("_")[0], set()).add(case["split"])
        return record["patients"], max(map(len, splits.values()))
    assert patients(patient="(P[0-9]+)_") == ({"train": 4, "valid": 1, "test": 1}, 1)
    assert sum(patients()[0].values()) == 12
    with pytest.raises(StudyError, match="data.patient = .*does not match the case P0_visit1 .12 of 12"): patients(patient="(pat[0-9]+)")
    for part in ("images", "labels"):
        for path in (tmp_path / f"raw/{part}Tr").iterdir(): path.rename(path.with_name(path.name.replace("P", "sub-").replace("visit", "ses-")))
    assert patients() == ({"train": 4, "valid": 1, "test": 1}, 1)


def test_linked_folders_are_told(tmp_path):
    for number in range(1, 5): write_scan(tmp_path / "elsewhere", number)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/training").symlink_to(tmp_path / "elsewhere/training")
    record = prepare(settings_of(tmp_path / "raw"), tmp_path / "a.h5", tmp_path / "a.json", workers=1, progress=False)
    assert [w["warning"].split(":")[0] for w in record["warnings"] if "linked folder" in w["warning"]] == ["training"]


def test_a_killed_preparation_goes_on(raw, store, tmp_path):
    """Killed by the operating system after the third case: no store, three parts; then only the others are prepared."""
    code = f"""
import os, signal
from levit_study.data import augment as augmenting, prepare as preparing
from levit_study.params import Data
done, original = [], preparing.prepare_case
def counted(*job):
    if len(done) == 3: os.kill(os.getpid(), signal.SIGKILL)
    done.append(original(*job))
preparing.prepare_case = counted
preparing.prepare(Data(**{settings_of(raw).model_dump()!r}), {str(tmp_path / "a.h5")!r}, {str(tmp_path / "a.json")!r}, workers=1, progress=False)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5.parts"]
    parts = list((tmp_path / "a.h5.parts").glob("[!.]*"))
    assert len(parts) == 3
    parts[0].write_bytes(parts[0].read_bytes()[:1000])  # a damaged part counts as absent
    prepare(settings_of(raw), tmp_path / "a.h5", tmp_path / "a.json", workers=1, progress=False)
    assert (tmp_path / "a.h5").read_bytes() == store.read_bytes() and not (tmp_path / "a.h5.parts").exists()


def workers_of(process):
    """The processes that prepare cases for `process`, once there are two."""
    for _ in range(600):
        children = subprocess.run(["pgrep", "-P", str(process), "-f", "spawn_main"], capture_output=True, text=True, check=False).stdout.split()
        if len(children) == 2: return [int(child) for child in children]
        time.sleep(0.1)
    raise AssertionError("no workers were started")


def test_a_lost_process_is_reported(raw, tmp_path):
    """The memory killer takes a worker: one line that says so, and no store."""
    killer = threading.Thread(target=lambda: os.kill(workers_of(os.getpid())[0], signal.SIGKILL))
    killer.start()
    with pytest.raises(StudyError, match="killed.*fewer workers"): prepare(settings_of(raw), tmp_path / "a.h5", tmp_path / "a.json", workers=2, progress=False)
    killer.join()
    assert not (tmp_path / "a.h5").exists()


def test_workers_end_with_their_parent(raw, tmp_path):
    """Killed outright, a preparation leaves no process behind."""
    code = f"""
from levit_study.data.prepare import prepare
from levit_study.params import Data
prepare(Data(**{settings_of(raw).model_dump()!r}), {str(tmp_path / "a.h5")!r}, {str(tmp_path / "a.json")!r}, workers=2, progress=False)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    workers = workers_of(parent.pid)
    while not list((tmp_path / "a.h5.parts").glob("[!.]*")) and parent.poll() is None: time.sleep(0.05)
    parent.kill()
    parent.wait()
    def runs(process):
        try: return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess: return False
    for _ in range(300):
        if not any(map(runs, workers)): return
        time.sleep(0.1)
    raise AssertionError("workers outlive their parent")


def test_full_disk(raw, tmp_path):
    """A limit on the size of files stands in for a disk that fills up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StudyError, match="cannot be written .*free space") as error:
            prepare(settings_of(raw), tmp_path / "a.h5", tmp_path / "a.json", workers=1, progress=False)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.rglob("*")] == ["a.h5.parts"]


def test_no_room_for_the_store(raw, tmp_path, monkeypatch):
    """Room is asked for before the cases are joined, and what was prepared is kept."""
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StudyError, match="MiB are needed"): prepare(settings_of(raw), tmp_path / "a.h5", tmp_path / "a.json", workers=1, progress=False)
    assert not (tmp_path / "a.h5").exists() and len(list((tmp_path / "a.h5.parts").iterdir())) == 12


def test_unwritable_place(raw, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written"): prepare(settings_of(raw), tmp_path / "file" / "a.h5", tmp_path / "a.json", progress=False)


def test_bad_cases_stop_or_are_listed(tmp_path):
    folder = tmp_path / "raw"
    for number in range(1, 7): write_scan(folder, number)
    damaged = folder / "training/patient002/patient002_frame09.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-2000])
    (folder / "training/patient004/patient004_frame01_gt.nii.gz").unlink()
    arguments = (tmp_path / "a.h5", tmp_path / "a.json")
    with pytest.raises(StudyError, match="and 1 more, see .*errors.txt") as error: prepare(settings_of(folder), *arguments, progress=False)
    assert "\n" not in str(error.value) and not arguments[0].exists()
    lines = (tmp_path / "errors.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["patient002_frame09", "patient004_frame01"]
    assert len(list((tmp_path / "a.h5.parts").iterdir())) == 10  # the others were prepared, and are not prepared again
    record = prepare(settings_of(folder, skip_bad=True), *arguments, progress=False)
    assert [entry["case"] for entry in record["skipped"]] == ["patient002_frame09", "patient004_frame01"]
    assert all(entry["reason"] and str(tmp_path) not in entry["reason"] for entry in record["skipped"])
    assert len(PreparedStore(tmp_path / "a.h5").cases) == 10 and not (tmp_path / "errors.txt").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_a_scan_raises_is_its_own_problem(raw, tmp_path, monkeypatch, workers):
    """A file whose reading raises what no library should: one line for it, and the others go on."""
    folder = tmp_path / "raw"
    for number in range(1, 7): write_scan(folder, number)
    bad = folder / "training/patient003/patient003_frame01.nii.gz"
    scan = nib.load(bad)
    scan.header["datatype"] = 1536  # a type that NumPy does not have everywhere
    content = bytearray(scan.header.binaryblock + b"\0" * 4 + np.asarray(scan.dataobj).tobytes())
    bad.write_bytes(__import__("gzip").compress(bytes(content)))
    record = prepare(settings_of(folder, skip_bad=True), tmp_path / "a.h5", tmp_path / "a.json", workers=workers, progress=False)
    assert [entry["case"] for entry in record["skipped"]] == ["patient003_frame01"] and len(record["cases"]) == 11
    assert "\n" not in record["skipped"][0]["reason"] and "patient003_frame01.nii.gz" in record["skipped"][0]["reason"]


def copy_scans(folder, source, target):
    """Give patient `target` the files of patient `source`."""
    for frame in ("01", "09"):
        for end in ("", "_gt"):
            content = (folder / f"patient{source:03d}/patient{source:03d}_frame{frame}{end}.nii.gz").read_bytes()
            (folder / f"patient{target:03d}/patient{target:03d}_frame{frame}{end}.nii.gz").write_bytes(content)


@pytest.mark.parametrize("seed", range(3))
def test_copies_are_split_together(tmp_path, seed):
    """Where fractions decide, two names of one heart are never on both sides of a split."""
    folder = tmp_path / "raw"
    for number in range(1, 8): write_scan(folder, number)
    for target in (4, 6): copy_scans(folder / "training", 1, target)
    split = {"kind": "fraction", "valid": 0.3, "test": 0.3, "seed": seed}
    arguments = (settings_of(folder, split=split), tmp_path / "a.h5", tmp_path / "a.json")
    record = prepare(*arguments, workers=1, progress=False)
    assert len({record["cases"][f"patient{number:03d}_frame01"]["split"] for number in (1, 4, 6)}) == 1
    assert record["left_out"] == [] and sum(record["patients"].values()) == 7
    said = {entry["case"]: entry["warning"] for entry in record["warnings"]}
    assert said["patient004_frame01"] == "same image as patient001_frame01 of another patient"
    assert "warning" in fingerprint(PreparedStore(tmp_path / "a.h5"))["warnings"].columns
    before = arguments[1].read_bytes()
    assert prepare(*arguments, workers=1, progress=False) == record and arguments[1].read_bytes() == before


def test_a_copy_of_a_test_patient_does_not_train(tmp_path, monkeypatch):
    """A folder of test patients decides: the training copy of one is left out, whole, and counted nowhere."""
    folder = tmp_path / "raw"
    for number in range(1, 8): write_scan(folder, number)
    (folder / "testing").mkdir()
    (folder / "training/patient007").rename(folder / "testing/patient007")
    source = folder / "testing/patient007/patient007_frame01.nii.gz"
    (folder / "training/patient005/patient005_frame01.nii.gz").write_bytes(source.read_bytes())  # one frame is enough: it is the same heart
    arguments = (settings_of(folder, split={"kind": "fraction", "valid": 0.2, "test": 0.0}), tmp_path / "a.h5", tmp_path / "a.json")
    record = prepare(*arguments, workers=1, progress=False)
    left = [(entry["case"], entry["reason"]) for entry in record["left_out"]]
    assert left == [(f"patient005_frame{frame}", "same images as patient007 in test") for frame in ("01", "09")]
    assert sum(record["patients"].values()) == 6 and record["patients"]["test"] == 1
    assert not {"patient005_frame01", "patient005_frame09"} & {*PreparedStore(arguments[1]).cases, *record["cases"]}
    rows = [row for row in (tmp_path / "splits.csv").read_text().splitlines() if row.startswith("patient005")]
    assert rows == ["patient005_frame01,patient005,DCM,left out,0", "patient005_frame09,patient005,DCM,left out,0"]
    assert any(entry["warning"].endswith("same images as patient007 in test") for entry in record["warnings"])
    before = arguments[1].read_bytes()
    monkeypatch.setattr(preparing, "prepare_case", None)  # nothing is prepared again, what was left out included
    assert prepare(*arguments, workers=1, progress=False) == record and arguments[1].read_bytes() == before


def test_what_many_cases_share_is_said_once(raw, store):
    from levit_study.data.manifest import _shared_lines
    lines = _shared_lines([("a", "x"), ("b", "y"), ("b", "x"), ("c", "x"), ("d", "y")], 4)
    assert lines == [("", "x (3 of 4 cases: a, b, c)"), ("b", "y"), ("d", "y")]


@pytest.mark.parametrize("damage", ["absent", "text", "cut", "empty", "keys", "format"])
def test_bad_stores(store, tmp_path, damage):
    path = tmp_path / "a.h5"
    if damage == "text": path.write_text("no store")
    elif damage == "cut": path.write_bytes(store.read_bytes()[:5000])
    elif damage == "empty": path.write_bytes(b"")
    elif damage == "keys":
        with h5py.File(path, "w") as file: file["image"] = np.zeros(3)
    elif damage == "format":
        path.write_bytes(store.read_bytes())
        with h5py.File(path, "a") as file: file.attrs["format"] = 99
    with pytest.raises(StudyError) as error: PreparedStore(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_slice_is_named_when_it_is_read_and_prepared_again(raw, store, tmp_path):
    path = tmp_path / "a.h5"
    prepare(settings_of(raw), path, tmp_path / "a.json", workers=1, progress=False)
    whole = path.read_bytes()
    opened = PreparedStore(path)
    case = opened.split("valid")[0]
    slices, volume = opened.file["slices/label"], opened.file[f"volumes/{case}/label"]
    places = [part.id.get_chunk_info(number).byte_offset for part, number in ((slices, int(opened.indices("valid")[0])), (volume, 0))]
    opened.close()
    for place, read in zip(places, (lambda store: store.load("valid"), lambda store: stored_volume(store, case)), strict=True):
        content = bytearray(whole)
        content[place + 10] ^= 1   # one bit
        path.write_bytes(content)
        with pytest.raises(StudyError, match="a.h5: is damaged .*dvc repro --force --single-item prepare@a"): read(PreparedStore(path))
    prepared, original = [], preparing.prepare_case
    def counted(case, *rest):
        prepared.append(case.name)
        return original(case, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "prepare_case", counted)
        prepare(settings_of(raw), path, tmp_path / "a.json", workers=1, progress=False)
    assert prepared == [case] and path.read_bytes() == whole


def test_recipes_need_no_torch():
    """params.yaml is checked in a moment."""
    code = "import sys; from levit_study.recipes import augmentation; augmentation('strong'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_memory_or_disk_gives_the_same(store):
    opened = PreparedStore(store)
    held, read = opened.load("train"), opened.load("train", limit_bytes=0)
    assert held.images is not None and read.images is None
    for ours, theirs in zip(held.batch([7, 0, 7]), read.batch([7, 0, 7]), strict=True): assert torch.equal(ours, theirs)
    assert held.case_of([0, 39]) == read.case_of([0, 39]) == [opened.split("train")[0], opened.split("train")[-1]]
    with pytest.raises(StudyError, match="no split 'training'"): opened.load("training")


@given(n=st.integers(0, 300), seed=st.integers(0, 2**32), epoch=st.integers(0, 1000), world=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_order_covers_all(n, seed, epoch, world):
    shards = [epoch_order(n, seed, epoch, rank, world) for rank in range(world)]
    dealt = np.stack(shards, 1).ravel()
    assert set(dealt.tolist()) == set(range(n)) and len(dealt) - n < world
    np.testing.assert_array_equal(dealt[:n], epoch_order(n, seed, epoch))


def sample(batch=6, side=48, classes=5):
    random = np.random.default_rng(0)
    labels = np.kron(random.integers(0, classes, (batch, side // 8, side // 8)), np.ones((8, 8))).astype(np.int64)
    images = (labels / classes + 0.1 * random.random(labels.shape)).astype(np.float32)
    return torch.from_numpy(images)[:, None], torch.from_numpy(labels)


@pytest.mark.parametrize("recipe", ["transunet", "strong", {"recipe": "strong", "mirror": 0.5, "turn": 0.3}])
@given(first=st.integers(0, 5), seed=st.integers(0, 2**32), epoch=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_a_sample_does_not_know_its_batch(recipe, first, seed, epoch):
    images, labels = sample()
    names = np.array([5, 0, 123456, 7, 2**31, 9])
    whole = augment(images, labels, recipe, seed, epoch, names)
    part = augment(images[first:], labels[first:], recipe, seed, epoch, names[first:])
    for ours, theirs in zip(whole, part, strict=True): assert torch.equal(ours[first:], theirs)
    assert whole[0].shape == images.shape and whole[1].dtype == labels.dtype
    assert 0 <= whole[0].min() and whole[0].max() <= 1 + 1e-6 and set(whole[1].unique().tolist()) <= set(range(5))


def test_threads_do_not_matter():
    images, labels = sample(24, 96)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(augment(images, labels, "strong", 0, 0, range(24)))
    torch.set_num_threads(1)
    for one, two in zip(*results, strict=True): assert torch.equal(one, two)


def test_inputs_stay_as_they_are():
    images, labels = sample()
    kept = images.clone(), labels.clone()
    augment(images, labels, {"recipe": "strong", "turn": 0.5, "mirror": 0.5}, 0, 0, range(6))
    assert torch.equal(images, kept[0]) and torch.equal(labels, kept[1])


def test_turns_are_exact():
    """Every sample turned: each result is one of NumPy's turned and mirrored arrays, image and label alike, and all four occur."""
    images, labels = sample(1)
    seen = set()
    for number in range(60):
        image, label = augment(images, labels, {"turn": 1.0}, 0, 0, [number])
        known = [(k, a) for k in range(4) for a in range(2) if np.array_equal(np.flip(np.rot90(images[0, 0], k), a), image[0, 0])]
        assert len(known) == 2 and all(np.array_equal(np.flip(np.rot90(labels[0], k), a), label[0]) for k, a in known)
        seen.add(known[0])
    assert len(seen) == 4


def test_shares_of_the_published_recipe():
    """Half are turned, a quarter rotated, a quarter left as they are."""
    images, labels = sample(1)
    n = 4000
    many, _ = augment(images.expand(n, -1, -1, -1), labels.expand(n, -1, -1), "transunet", 3, 1, range(n))
    same = (many == images).flatten(1).all(1).double().mean().item()
    exact = many.flatten(1).sort().values.eq(images.flatten().sort().values).all(1).double().mean().item()  # the same pixels, moved or not
    assert abs(same - 0.25) < 0.03 and abs(exact - 0.75) < 0.03


def test_rotation_is_scipys():
    """Where both take pixels from inside the image, a rotation equals SciPy's of first order to float precision."""
    images = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    recipe = augmentation({"affine": 1.0, "rotation": 20})
    for number in range(5):
        image, _ = augment(images, labels, recipe, 0, 0, [number])
        angle = 20 * (2 * augmenting._draw(0, 0, [number])[0]["angle"][0] - 1)
        expected = ndimage.rotate(images[0, 0].numpy(), angle, order=1, reshape=False)
        assert np.abs(expected - image[0, 0].numpy())[16:48, 16:48].max() < 1e-4


def test_label_follows_image():
    """An image that is its own label map stays so under every geometric change, up to the blending at edges."""
    _, labels = sample(6, classes=2)
    images = labels[:, None].float()
    for epoch in range(5):
        image, label = augment(images, labels, {"affine": 1.0, "rotation": 30, "scale": 0.3, "shift": 0.1, "elastic": 1.0}, 0, epoch, range(6))
        assert ((image[:, 0] > 0.5) == (label == 1)).double().mean() > 0.985


def test_strong_keeps_left_and_right():
    """A bar on the right of the image stays there: nothing in the recipe mirrors unless asked."""
    images, labels = torch.zeros(200, 1, 64, 64), torch.zeros(200, 64, 64, dtype=torch.long)
    images[:, :, 20:44, 40:50], labels[:, 20:44, 40:50] = 1, 1
    columns = torch.arange(64.0)
    def middles(recipe):
        label = augment(images, labels, recipe, 0, 0, range(200))[1].float()
        return (label.sum(1) * columns).sum(1) / label.sum((1, 2)).clamp(min=1)
    assert (middles("strong") > 32).all() and (middles({"recipe": "strong", "mirror": 0.5}) < 32).double().mean() > 0.3


@pytest.mark.parametrize(("recipe", "said"), [("heavy", "none, transunet, strong"), ({"recipe": "strong", "rotate": 3}, "augmentation.rotate: unknown key"),
    ({"rotation": 400}, "augmentation.rotation = 400"), ({"turn": "half"}, "augmentation.turn = 'half'"), ({"elastic_nodes": 2.5}, "integer"),
    ({"noise": float("nan")}, "noise")])
def test_bad_recipes(recipe, said):
    with pytest.raises(StudyError, match=said.replace(".", r"\.")): augmentation(recipe)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card")
def test_graphics_card_agrees():
    images, labels = sample()
    here, there = (augment(images.to(device), labels.to(device), "strong", 0, 0, range(6)) for device in ("cpu", "cuda"))
    assert (here[0] - there[0].cpu()).abs().max() < 1e-3 and (here[1] == there[1].cpu()).double().mean() > 0.999


def test_a_real_case_can_be_planned():
    """Of the public ACDC subset, where it is on this machine."""
    folder = Path(os.environ.get("LEVIT_STUDY_ACDC", Path(__file__).parents[2] / "shared/data/acdc"))
    if not (folder / "train_slices.list").exists(): pytest.skip(f"no ACDC data at LEVIT_STUDY_ACDC or {folder}")
    from levit_study.data.layouts import find_cases
    data = Data(folder=str(folder), structures={"right ventricle": 1, "myocardium": 2, "left ventricle": 3}, intensity="unit")
    assert planning.plan_case(find_cases(folder)[0], data).problem == ""
