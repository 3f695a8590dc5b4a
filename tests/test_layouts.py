"""Data sets as they come: renamed, nested, listed in any encoding, in other formats; and real ACDC in such forms."""
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from levit_study.data.cases import Case
from levit_study.data.folds import fold_splits
from levit_study.data.labels import acdc_structures, synapse_structures
from levit_study.data.layouts import find_cases
from levit_study.data.phantom import make_phantom
from levit_study.data.splits import split_cases
from levit_study.data.volumes import read_volume
from levit_study.files import StudyError

ROOT = Path(__file__).resolve().parent.parent
CHALLENGE = Path(os.environ.get("LEVIT_STUDY_ACDC_CHALLENGE", ROOT.parent/"shared/data/acdc_challenge"))
CT = {"label_map": "btcv13", "structures": synapse_structures}
MR = {"intensity": "minmax", "structures": acdc_structures}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantom(folder/"ct", "ct", cases=2, shape=(8, 32, 32))
    make_phantom(folder/"mr", "mr", cases=2, shape=(6, 32, 32))
    return folder


def linked(source, target, rename):
    "Link every file of `source` into `target`, its relative path renamed"
    for path in source.rglob("*"):
        if not path.is_file() or path.name == "phantom.json": continue
        link = target/rename(path.relative_to(source).as_posix())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return target


def as_tuples(cases): return [(case.name, case.patient, case.group, case.split, case.problem) for case in cases]


def assert_same(cases, others, settings):
    "The same cases, and the same voxels in them"
    assert len(cases) >= 2 and as_tuples(cases) == as_tuples(others)
    for case, other in zip(cases, others, strict=True):
        volume, expected = read_volume(case, **settings), read_volume(other, **settings)
        assert np.array_equal(volume.image, expected.image) and np.array_equal(volume.label, expected.label)


# --- names and folders ---------------------------------------------------------------------------------------------------------------------------------


RENAMED = {"upper case": str.upper, "title case": str.title, "one folder down": lambda name: f"download/{name}",
           "three folders down, upper case": lambda name: f"A/B/C/{name.upper()}"}


@pytest.mark.parametrize("how", RENAMED)
@pytest.mark.parametrize("kind, settings", [("ct", CT), ("mr", MR)])
def test_renamed_and_nested_is_read_the_same(phantoms, tmp_path, kind, settings, how):
    folder = linked(phantoms/kind, tmp_path, RENAMED[how])
    assert_same(find_cases(folder), find_cases(phantoms/kind), settings)


@pytest.mark.parametrize("place", ["database/training", "ACDC/database/Training", "Training", "."])
@pytest.mark.parametrize("frame", ["frame1", "frame01", "Frame001"])
def test_acdc_as_it_is_passed_on(phantoms, tmp_path, place, frame):
    "The folders of its copies, and frame numbers with and without zeros; Info.cfg says frame 1"
    def rename(name): return name.replace("training", place).replace("frame01", frame)
    folder = linked(phantoms/"mr", tmp_path, rename)
    assert_same(find_cases(folder), find_cases(phantoms/"mr"), MR)


def test_the_highest_data_set_is_taken(phantoms, tmp_path):
    linked(phantoms/"ct", tmp_path, str)
    linked(phantoms/"ct", tmp_path/"old/copy/of", str)
    assert all("old" not in str(case.image) for case in find_cases(tmp_path))


def test_two_data_sets_side_by_side_are_refused(phantoms, tmp_path):
    for name in ("first", "second"): linked(phantoms/"mr", tmp_path/name, str)
    with pytest.raises(StudyError, match="holds data sets in .*first and .*second: set data.folder"): find_cases(tmp_path)
    assert len(find_cases(tmp_path/"second")) == 4


def test_images_without_labels_beside_labelled_ones_do_not_matter(phantoms, tmp_path):
    linked(phantoms/"ct", tmp_path/"train", str)
    (tmp_path/"test/RawData/img").mkdir(parents=True)
    (tmp_path/"test/RawData/img/img0061.nii.gz").touch()
    assert_same(find_cases(tmp_path), find_cases(phantoms/"ct"), CT)


def test_one_name_in_two_cases_of_letters(phantoms, tmp_path):
    "On a disk that tells them apart, the second file is named, not read over the first"
    folder = linked(phantoms/"ct", tmp_path, str)
    image = next(folder.rglob("img0001.nii.gz"))
    twin = image.with_name("IMG0001.NII.GZ")
    if twin.exists(): pytest.skip("this disk takes both names for one file")
    twin.symlink_to(image)
    assert "a second file for case 0001: keep one" in find_cases(folder)[0].problem


@pytest.mark.parametrize("form", ["slices", "volumes"])
def test_hdf5_and_npz_in_upper_case(tmp_path, form):
    image = np.random.default_rng(0).random((3, 16, 18), np.float32)
    label = np.zeros((3, 16, 18), np.uint8)
    label[:, 4:12, 3:7], label[:, 4:12, 8:15], label[:, 6:10, 10:13] = 1, 2, 3
    for number, place in enumerate(("TRAIN", "Valid"), 1):
        (tmp_path/place).mkdir()
        if form == "volumes":
            with h5py.File(tmp_path/place/f"CASE_00{number}_VOLUME_ED.NPY.H5", "w") as file:
                file["image"], file["label"] = image, label
            continue
        for i in range(3):
            with (tmp_path/place/f"CASE_00{number}_SLICEED_{i}.NPZ").open("wb") as file:
                np.savez(file, image=image[i], label=label[i])
    cases = find_cases(tmp_path)
    assert as_tuples(cases) == [("case_001_ED", "case_001", None, "train", None), ("case_002_ED", "case_002", None, "valid", None)]
    for case in cases: assert np.array_equal(read_volume(case, **MR).label, label)


# --- texts ---------------------------------------------------------------------------------------------------------------------------------------------


def names_only(folder, *names):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).touch()
    return folder


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r\n\r\n", "\r"])
def test_lists_in_any_encoding(tmp_path, encoding, ending):
    def write(name, *entries): (tmp_path/name).write_bytes((ending.join(("", *entries, " ", ""))).encode(encoding))
    names_only(tmp_path, *(f"train_npz/case0005_slice{k:03d}.npz" for k in range(3)), "test_vol_h5/case0008.npy.h5")
    write("train.txt", *(f"case0005_slice{k:03d}" for k in range(3)))
    write("Test_vol.txt", "Case0008.npy.h5")
    assert as_tuples(find_cases(tmp_path)) == [("case0005", "case0005", None, "train", None), ("case0008", "case0008", None, "valid", None)]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_in_any_encoding(tmp_path, encoding):
    names_only(tmp_path, *(f"{part}/{name}.nii.gz" for part in ("imagesTr", "LabelsTr") for name in ("a", "b")))
    (tmp_path/"dataset.json").write_bytes(json.dumps({"labels": {"background": 0, "Lésion": 1}}, ensure_ascii=False).encode(encoding))
    (tmp_path/"splits_final.json").write_bytes(json.dumps([{"train": ["a"], "val": ["b"]}], indent=1).replace("\n", "\r\n").encode(encoding))
    assert [(case.name, case.split, case.problem) for case in find_cases(tmp_path)] == [("a", "train", None), ("b", "valid", None)]


@pytest.mark.parametrize("encoding", [*ENCODINGS, "latin-1"])
def test_info_in_any_encoding(tmp_path, encoding):
    names_only(tmp_path, "training/patient001/patient001_frame01.nii.gz", "training/patient001/patient001_frame01_gt.nii.gz")
    (tmp_path/"training/patient001/Info.cfg").write_bytes("ED: 1\r\n\r\nES: 01\r\nGroup: DCM\r\nName: Émile\r\n".encode(encoding))
    assert as_tuples(find_cases(tmp_path)) == [("patient001_frame01", "patient001", "DCM", None, None)]


@pytest.mark.parametrize("content, message", [
    (b"\x1f\x8b\x08\x00\xff\xfe\x00\x00", "not text in UTF-8 or UTF-16: save it as UTF-8"),
    ("case0005_slice000\nété\u00a0x\n".encode("latin-1"), "not text in UTF-8 or UTF-16"),
    (b"case0005_slice000,case0005_slice001\n", "'case0005_slice000,case0005_slice001' is not a file name"),
    (b"PK\x03\x04\x00\x00", "is not a file name"),
])
def test_a_list_that_is_none_is_named(tmp_path, content, message):
    names_only(tmp_path, "train_npz/case0005_slice000.npz")
    (tmp_path/"train.txt").write_bytes(content)
    with pytest.raises(StudyError, match=f"train.txt: .*{message}") as caught: find_cases(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_folds_are_listed_in_any_encoding(encoding, tmp_path):
    cases = [Case(name, name, tmp_path) for name in ("a", "b")]
    (tmp_path/"folds.json").write_bytes(json.dumps([{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]).encode(encoding))
    assert fold_splits(cases, [], tmp_path/"folds.json") == [{"a": "train", "b": "valid"}, {"a": "valid", "b": "train"}]
    (tmp_path/"folds.json").write_bytes("[é".encode("latin-1"))
    with pytest.raises(StudyError, match="folds.json: not text in UTF-8 or UTF-16: save it as UTF-8"): fold_splits(cases, [], tmp_path/"folds.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 50_000, b"1" * 5000, "{\u201clabels\u201d: 1}".encode("utf-16")])
@pytest.mark.parametrize("name", ["dataset.json", "splits_final.json"])
def test_json_that_is_none_is_named(tmp_path, name, content):
    names_only(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    (tmp_path/"dataset.json").write_text("{}")
    (tmp_path/name).write_bytes(content)
    with pytest.raises(StudyError, match=f"{name}: ") as caught: find_cases(tmp_path)
    assert "\n" not in str(caught.value)


# --- other formats -------------------------------------------------------------------------------------------------------------------------------------


DICOM = b"\0"*128 + b"DICM" + b"\0"*100


@pytest.mark.parametrize("name, content, message", [
    ("series/IM-0001.dcm", b"x", "this is DICOM; .* dcm2niix"), ("p/st/se/IM0001", DICOM, "this is DICOM"),
    ("p/1.3.12.2.1107", DICOM, "this is DICOM"), ("DICOMDIR", b"x", "this is DICOM"), ("a/SCAN.NRRD", b"x", "this is NRRD; .* SimpleITK"),
    ("imagesTr/a.mha", b"x", "this is MetaImage"), ("img/img0001.hdr", b"x", "Analyze or NIfTI pair; .* nib-convert img0001.hdr"),
    ("subject/brain.mgz", b"x", "FreeSurfer"), ("t1.mnc", b"x", "MINC"),
])
def test_other_formats_are_named_with_a_converter(tmp_path, name, content, message):
    names_only(tmp_path, name)
    (tmp_path/name).write_bytes(content)
    with pytest.raises(StudyError, match=message) as caught: find_cases(tmp_path)
    assert str(tmp_path/name) in str(caught.value) and "\n" not in str(caught.value)


def test_dicom_beside_a_data_set_does_not_matter(phantoms, tmp_path):
    folder = linked(phantoms/"ct", tmp_path, str)
    (folder/"IM0001.dcm").write_bytes(DICOM)
    assert len(find_cases(folder)) == 2


def test_an_unreadable_or_endless_folder_ends_in_one_line(tmp_path):
    (tmp_path/"loop").symlink_to(tmp_path)
    with pytest.raises(StudyError, match="no scans in a layout known here"): find_cases(tmp_path)


# --- real ACDC -----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not CHALLENGE.is_dir(), reason=f"no ACDC data at {CHALLENGE} (set LEVIT_STUDY_ACDC_CHALLENGE)")
def test_real_acdc_in_its_copies_form(tmp_path):
    "100 patients in five groups; nested and renamed, the same cases"
    cases = find_cases(CHALLENGE)
    assert len(cases) == 200 and len({case.patient for case in cases}) == 99 and not any(case.problem for case in cases)
    assert {group: sum(case.group == group for case in cases) for group in ("NOR", "DCM", "HCM", "MINF", "RV")} == \
        dict.fromkeys(("NOR", "DCM", "HCM", "MINF", "RV"), 40)
    def rename(name): return "ACDC/database/" + name.replace("training", "Training").replace("frame0", "frame").replace(".nii.gz", ".NII.GZ")
    copy = find_cases(linked(CHALLENGE, tmp_path, rename))
    assert as_tuples(copy) == as_tuples(cases)
    assert split_cases(copy, "fraction", test=0.2) == split_cases(cases, "fraction", test=0.2)
