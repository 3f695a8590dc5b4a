"""The same scans in every layout give the same volumes; real ACDC files are read as their README says; phantoms are what they claim at any size."""
import json
import os
import time
from collections import Counter
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from levit_study.files import StudyError
from levit_study.data.abdomen import ct_field
from levit_study.data.heart import mr_shares
from levit_study.data.phantom import make_phantom
from levit_study.data.labels import acdc_structures, check_sides, label_table, map_labels, numberings, synapse_structures
from levit_study.data.volumes import check_volume, digest, read_volume, turn
from levit_study.data.layouts import find_cases
from levit_study.data.splits import split_cases

ROOT = Path(__file__).resolve().parent.parent
ACDC = Path(os.environ.get("LEVIT_STUDY_ACDC", ROOT.parent/"shared/data/acdc"))
RAW = {"label_map": "btcv13", "structures": synapse_structures}


@pytest.fixture(scope="module")
def abdomens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ct")
    make_phantom(folder, "ct", cases=6, shape=(20, 64, 72))
    return folder


@pytest.fixture(scope="module")
def hearts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mr")
    make_phantom(folder, "mr", cases=10, shape=(8, 64, 64))
    return folder


def stored(array, axes):
    "An array in the study's orientation as a preparation script with other axes would have stored it"
    return nib.orientations.apply_orientation(array, nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(("S", "P", "L")), nib.orientations.axcodes2ornt(tuple(axes))))


@pytest.mark.parametrize("axes", ["SPL", "SLP", "SLA", "SAL", "SRA", "IPL"])
def test_transunet_form_is_turned_to_the_study_orientation(abdomens, tmp_path, axes):
    "Whatever axes the preparation script left, by slices or by volumes, the organs tell"
    (tmp_path/"train_npz").mkdir()
    (tmp_path/"test_vol_h5").mkdir()
    for case in find_cases(abdomens):
        volume = read_volume(case, **RAW)
        image, label = stored(volume.image, axes), stored(volume.label, axes)
        if case.name in ("case0005", "case0006"):
            for i in range(len(image)): np.savez(tmp_path/f"train_npz/{case.name}_slice{i:03d}.npz", image=image[i], label=label[i])
        else:
            with h5py.File(tmp_path/f"test_vol_h5/{case.name}.npy.h5", "w") as file: file["image"], file["label"] = image, label
    read = find_cases(tmp_path)
    assert Counter(case.split for case in read) == {"train": 2, "valid": 4}
    for case, source in zip(read, find_cases(abdomens), strict=True):
        volume, truth = read_volume(case, "unit", structures=synapse_structures, label_map="transunet"), read_volume(source, **RAW)
        assert np.array_equal(volume.label, truth.label) and np.array_equal(volume.image, truth.image)
        assert volume.spacing is None and (axes == "SPL") == (not volume.notes)
        assert np.array_equal(read_volume(case, "unit", structures=synapse_structures, orientation=axes).label, truth.label)


@pytest.mark.parametrize("name", numberings)
def test_every_numbering_reads_to_the_same_labels(abdomens, name):
    "Written in a numbering and read in it: the same; read in another: caught"
    truth = read_volume(find_cases(abdomens)[0], **RAW).label
    raw = map_labels(truth, label_table({study: value for value, study in numberings[name].items() if study}))
    assert np.array_equal(map_labels(raw, label_table(name, synapse_structures)), truth)
    for other in numberings:
        if other == name or (name, other) == ("cascade", "btcv13"): continue
        with pytest.raises(ValueError): check_sides(map_labels(raw, label_table(other)), synapse_structures)


def test_decathlon_form_reads_like_the_challenge(hearts, tmp_path):
    (tmp_path/"dataset.json").write_text('{"labels": {"background": 0, "RV": 1, "MLV": 2, "LVC": 3}, "file_ending": ".nii.gz"}')
    for name in ("imagesTr", "labelsTr"): (tmp_path/name).mkdir()
    source = find_cases(hearts)
    for case in source:
        (tmp_path/f"imagesTr/{case.name}_0000.nii.gz").symlink_to(case.image)
        (tmp_path/f"labelsTr/{case.name}.nii.gz").symlink_to(case.label)
    read = find_cases(tmp_path)
    assert [(case.name, case.patient) for case in read] == [(case.name, case.patient) for case in source]
    for case, other in zip(read[:3], source, strict=False):
        a, b = (read_volume(c, "minmax", structures=acdc_structures) for c in (case, other))
        assert np.array_equal(a.image, b.image) and np.array_equal(a.label, b.label) and a.spacing == b.spacing


@pytest.mark.parametrize("names, listed", [
    (["amos_0001", "amos_0004"], ["amos_0001", "amos_0004"]),                    # four digits of the case's own name
    (["p1_frame01_0000", "p1_frame12_0000"], ["p1_frame01", "p1_frame12"]),      # nnU-Net's channel, listed without it as its first version does
    (["p1_ED_0000", "p1_ES_0000"], ["p1_ED_0000", "p1_ES_0000"]),                # or with it
    (["amos_0001_0000", "amos_0004_0000"], ["amos_0001", "amos_0004"]),
])
def test_decathlon_names(hearts, tmp_path, names, listed):
    about = {"labels": {"background": 0, "RV": 1}, "training": [{"image": f"./imagesTr/{name}.nii.gz"} for name in listed]}
    (tmp_path/"dataset.json").write_text(json.dumps(about))
    for name in ("imagesTr", "labelsTr"): (tmp_path/name).mkdir()
    for name, case in zip(names, find_cases(hearts), strict=False):
        (tmp_path/f"imagesTr/{name}.nii.gz").symlink_to(case.image)
        (tmp_path/f"labelsTr/{name.removesuffix('_0000')}.nii.gz").symlink_to(case.label)
    cases = find_cases(tmp_path)
    assert [(case.name, case.problem) for case in cases] == [(name.removesuffix("_0000"), None) for name in names]
    assert {case.patient for case in cases} == ({"p1"} if names[0].startswith("p1") else set(names) if "_0000" not in names[0] else {"amos_0001", "amos_0004"})
    drawn = tmp_path/f"labelsTr/{names[0].removesuffix('_0000')}.nii.gz"
    kept = drawn.readlink()
    drawn.unlink()
    assert ["no label map for this image" in case.problem for case in find_cases(tmp_path) if case.problem] == [True]
    drawn.symlink_to(kept)
    (tmp_path/f"imagesTr/{names[0]}.nii.gz").unlink()
    assert [case.problem for case in find_cases(tmp_path) if case.problem]


def test_a_second_copy_of_a_case_is_named(abdomens, tmp_path):
    case = find_cases(abdomens)[0]
    for place in (".", "img"):
        (tmp_path/"btcv"/place).mkdir(parents=True, exist_ok=True)
        (tmp_path/"btcv"/place/"img0001.nii.gz").symlink_to(case.image)
    (tmp_path/"btcv/label0001.nii.gz").symlink_to(case.label)
    assert "a second file for case 0001: keep one" in find_cases(tmp_path/"btcv")[0].problem
    for place in ("train_npz", "train_npz_new"):
        (tmp_path/"slices"/place).mkdir(parents=True)
        for k in range(3): np.savez(tmp_path/f"slices/{place}/case0005_slice{k:03d}.npz", image=np.eye(4), label=np.eye(4))
    with pytest.raises(StudyError, match="slices of case case0005 lie in train_npz, too"): find_cases(tmp_path/"slices")
    for place, numbers in (("data", (0, 1)), ("data/slices", (1, 2))):
        (tmp_path/"ssl"/place).mkdir(parents=True)
        for k in numbers:
            with h5py.File(tmp_path/f"ssl/{place}/patient001_frame01_slice_{k}.h5", "w") as file: file["image"] = file["label"] = np.ones((4, 4))
    with pytest.raises(StudyError, match="slices of case patient001_frame01 lie in data, too"): find_cases(tmp_path/"ssl")
    for place in ("test_vol_h5", "valid"):
        (tmp_path/"volumes"/place).mkdir(parents=True)
        with h5py.File(tmp_path/f"volumes/{place}/case0008.npy.h5", "w") as file: file["image"] = file["label"] = np.ones((2, 4, 4))
    with pytest.raises(StudyError, match="case0008.npy.h5: a second file for case case0008"): find_cases(tmp_path/"volumes")


def test_patients_are_never_divided(hearts):
    cases = find_cases(hearts)
    for seed in range(20):
        splits = split_cases(cases, "fraction", valid=0.2, test=0.2, seed=seed)
        assert all(len({splits[case.name] for case in cases if case.patient == patient}) == 1 for patient in {case.patient for case in cases})
        assert Counter(splits.values()) == {"train": 12, "valid": 4, "test": 4}
    assert split_cases(cases, "lists", valid=0.2, test=0.2, seed=3) == split_cases(cases, "fraction", valid=0.2, test=0.2, seed=3)


@pytest.mark.parametrize("shape, spacing", [((5, 33, 47), None), ((40, 160, 96), None), ((24, 128, 128), (5, 2.5, 2.5)), ((4, 4, 4), None)])
def test_phantoms_of_any_size_read_back(tmp_path, shape, spacing):
    for kind, settings in (("ct", RAW), ("mr", {"intensity": "minmax", "structures": acdc_structures})):
        make_phantom(tmp_path/kind, kind, cases=1, shape=shape, spacing=spacing)
        volume = read_volume(find_cases(tmp_path/kind)[0], **settings)
        assert volume.image.shape == shape and 0 <= volume.image.min() < volume.image.max() <= 1
        if spacing: assert np.allclose(volume.spacing, spacing)


def test_shares_hold_whatever_the_grid(tmp_path):
    "Finer slices of the same seed are the same organs, to a tenth"
    shares = []
    for shape in ((24, 96, 96), (48, 192, 192)):
        make_phantom(tmp_path/str(shape), "ct", cases=1, shape=shape)
        label = read_volume(find_cases(tmp_path/str(shape))[0], **RAW).label
        shares.append(np.bincount(label.ravel(), minlength=9)[1:]/label.size*np.prod(ct_field)/1000)
    assert np.abs(shares[0]/shares[1] - 1).max() < 0.15, shares


def test_phantom_cases_do_not_depend_on_their_number(tmp_path):
    for cases in (2, 3): make_phantom(tmp_path/str(cases), "mr", cases=cases, shape=(6, 48, 48))
    files = [path.relative_to(tmp_path/"2") for path in (tmp_path/"2/training").rglob("*") if path.is_file()]
    assert len(files) == 10 and all((tmp_path/"2"/file).read_bytes() == (tmp_path/"3"/file).read_bytes() for file in files)


def test_sixteen_phantoms_take_seconds(tmp_path):
    start = time.process_time()
    make_phantom(tmp_path, "ct", cases=16)
    assert time.process_time() - start < 10


@pytest.mark.skipif(not ACDC.is_dir(), reason=f"no ACDC data at {ACDC} (set LEVIT_STUDY_ACDC)")
def test_real_acdc():
    "160 volumes of 80 patients, 1,312 training slices; no distances in mm; the two patients that are one scan are kept together"
    cases = find_cases(ACDC)
    assert Counter(case.split for case in cases) == {"train": 140, "valid": 20} and not any(case.problem for case in cases)
    assert sum(len(case.parts) for case in cases) == 1312 and len({case.patient for case in cases}) == 79
    seen, lines, shares = {}, [], {"01": [], "02": []}
    for case in cases:
        volume = read_volume(case, "unit", structures=acdc_structures)
        assert volume.spacing is None and volume.image.shape == volume.label.shape
        lines += [(case.name, line) for line in check_volume(volume, acdc_structures, seen)]
        shares[case.name[-2:]].append(np.bincount(volume.label.ravel(), minlength=4)[1:]/volume.label.size)
    assert lines == [(f"patient076_frame0{k}", f"the same image as patient074_frame0{k}") for k in (1, 2)]
    for frame, phase in (("01", "ED"), ("02", "ES")): assert np.allclose(np.mean(shares[frame], axis=0), mr_shares[phase], atol=1e-4)


def test_turn_and_digest():
    array = np.arange(24).reshape(2, 3, 4)
    assert np.array_equal(turn(array, "SLP"), array.transpose(0, 2, 1)) and np.array_equal(turn(array, "IAR"), array[::-1, ::-1, ::-1])
    assert digest(array) != digest(array.reshape(2, 4, 3)) and digest(array) == digest(array.copy())
