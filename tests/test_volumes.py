"""The same scans in every layout give the same volumes; real ACDC files are read as their README says; phantoms are what they claim at any size."""
import fcntl
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from levit_study.files import StudyError
from levit_study.data.abdomen import ct_field
from levit_study.data.heart import mr_shares
from levit_study.data.phantom import make_phantom
from levit_study.data.affines import affine_wrong, header_affine
from levit_study.data.nifti import write_label_map
from levit_study.data.labels import acdc_structures, check_anatomy, label_table, map_labels, numberings, synapse_structures
from levit_study.data.volumes import check_volume, read_scan, read_volume, scale_intensity, shared_orientation
from levit_study.data.layouts import Case, find_cases
from levit_study.data.splits import split_cases
from levit_study.evaluation.metrics import hd95, surface_distances

ROOT = Path(__file__).resolve().parent.parent
ACDC = Path(os.environ.get("LEVIT_STUDY_ACDC", ROOT.parent/"shared/data/acdc"))
CHALLENGE = Path(os.environ.get("LEVIT_STUDY_ACDC_CHALLENGE", ROOT.parent/"shared/data/acdc_challenge"))
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
        with pytest.raises(ValueError): check_anatomy(map_labels(raw, label_table(other)), synapse_structures)


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


@pytest.mark.skipif(not ACDC.is_dir(), reason=f"no ACDC data at {ACDC} (set LEVIT_STUDY_ACDC)")
def test_real_acdc():
    "160 volumes of 80 patients, 1,312 training slices; no distances in mm; the two patients that are one scan are kept together"
    cases = find_cases(ACDC)
    assert Counter(case.split for case in cases) == {"train": 140, "valid": 20} and not any(case.problem for case in cases)
    assert sum(len(case.parts) for case in cases) == 1312 and len({case.patient for case in cases}) == 79
    lines, shares = [], {"01": [], "02": []}
    for case in cases:
        volume = read_volume(case, "unit", structures=acdc_structures)
        assert volume.spacing is None and volume.image.shape == volume.label.shape
        lines += check_volume(volume, acdc_structures)
        shares[case.name[-2:]].append(np.bincount(volume.label.ravel(), minlength=4)[1:]/volume.label.size)
    assert not lines
    for frame, phase in (("01", "ED"), ("02", "ES")): assert np.allclose(np.mean(shares[frame], axis=0), mr_shares[phase], atol=1e-4)


# --- headers as they really are ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not CHALLENGE.is_dir(), reason=f"no ACDC challenge data at {CHALLENGE} (set LEVIT_STUDY_ACDC_CHALLENGE)")
def test_real_acdc_challenge(tmp_path):
    "200 volumes whose size stands in pixdim alone; healthy left ventricles are of a healthy size; a shift is measured in millimetres"
    cases, left = find_cases(CHALLENGE), {}
    assert len(cases) == 200 and not any(case.problem for case in cases)
    for case in cases:
        volume, header = read_volume(case, "minmax", structures=acdc_structures), nib.load(case.image).header
        assert volume.spacing == tuple(map(float, header["pixdim"][[3, 2, 1]])) and volume.notes[0] == affine_wrong
        left.setdefault((case.group, case.name[:10]), []).append((volume.label == 3).sum()*np.prod(volume.spacing)/1000)
        if case.name == "patient001_frame01":
            chamber = volume.label == 3
            shifted = np.roll(chamber, 4, axis=2)
            assert hd95(*surface_distances(shifted, chamber, volume.spacing)) == pytest.approx(5.63, abs=0.01)
            written = tmp_path/"a.nii.gz"
            write_label_map(written, volume.label, read_scan(case.image, "minmax")[1])
            assert np.array_equal(np.asarray(nib.load(written).dataobj), np.asarray(nib.load(case.label).dataobj))
            assert all(np.array_equal(nib.load(written).header[name], header[name], equal_nan=True) for name in GRID)
    assert max(left["DCM", "patient001"]) == pytest.approx(295.5, abs=0.1)
    healthy = [(max(frames), 1 - min(frames)/max(frames)) for (group, _), frames in left.items() if group == "NOR"]
    assert len(healthy) == 20 and all(70 < size < 220 and 0.5 < ejected < 0.75 for size, ejected in healthy)
    failing = [1 - min(frames)/max(frames) for (group, _), frames in left.items() if group == "DCM"]
    assert len(failing) == 20 and max(failing) < 0.4


GRID = ["pixdim", "xyzt_units", "qform_code", "sform_code", *(f"quatern_{k}" for k in "bcd"),
        *(f"{name}_{k}" for name in ("qoffset", "srow") for k in "xyz")]
STRAIGHT = np.diag([-1.5, -2, 3, 1])                       # a quaternion of length 1
HALF_TURN = np.array([[0, -2, 0, 5], [-1.5, 0, 0, -7], [0, 0, -3, 60], [0, 0, 0, 1.0]])
OBLIQUE = np.array([[0, 0.2, -2.99, 5], [1.5, 0, 0, -7], [0, 1.99, 0.3, 60], [0, 0, 0, 1.0]])


def flawed_header(image_class, endian, affine, sform, qform):
    "A header that describes voxels of 5 x 6 x 7 by `affine`, with the named flaws in its two forms (None: not coded); None if the flaw is impossible"
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    flawed = {"right": affine, "without size": affine/[*sides, 1], "three times too large": affine*[3, 3, 3, 1], "zero": affine*0,
              "not a number": affine*np.nan, "sheared": affine + np.outer([1, 0, 0, 0], affine[1])*0.3, None: affine*0 + 7}
    header = image_class(np.zeros((5, 6, 7), np.uint8), None, image_class.header_class(endianness=endian)).header
    header["vox_offset"] = header.single_vox_offset
    header.set_data_dtype(np.uint8)
    header.set_zooms(sides)
    if qform: header.set_qform(affine, 1)
    for row, numbers in zip("xyz", flawed[sform], strict=False): header[f"srow_{row}"] = numbers
    header["sform_code"] = 2 if sform else 0
    turn = np.array([header[f"quatern_{k}"] for k in "bcd"], float)
    if qform == "too long":
        if np.linalg.norm(turn) < 0.999: return None      # not half a turn: a longer quaternion is another direction
        for k, value in zip("bcd", turn/np.linalg.norm(turn)*1.000003, strict=True): header[f"quatern_{k}"] = value
    if qform == "qfac 0":
        if header["pixdim"][0] < 0: return None           # a left-handed qform needs its qfac
        header["pixdim"][0] = 0
    if qform == "negative pixdim": header["pixdim"][2] *= -1
    if qform == "no quaternion": header["quatern_c"] = 4
    return header


@pytest.mark.parametrize("sform", [None, "right", "without size", "three times too large", "zero", "not a number", "sheared"])
@pytest.mark.parametrize("qform", [None, "right", "too long", "qfac 0", "negative pixdim", "no quaternion"])
def test_every_form_of_a_header(sform, qform, tmp_path):
    "One of the two forms, or pixdim with the sform's directions, gives the voxel that was scanned; what is written back has the header as it was"
    usable, tried = sform in ("right", "without size", "three times too large"), 0
    for image_class, endian, affine in product((nib.Nifti1Image, nib.Nifti2Image), "<>", (STRAIGHT, HALF_TURN, OBLIQUE)):
        header = flawed_header(image_class, endian, affine, sform, qform)
        if header is None: continue
        tried, path, back = tried + 1, tmp_path/"a.nii.gz", tmp_path/"b.nii.gz"
        path.write_bytes(gzip.compress(header.binaryblock + bytes(4) + bytes(range(210))))
        if not usable and qform in (None, "no quaternion") and (sform, qform) != (None, None):
            with pytest.raises(StudyError, match="not plausible|sheared"): read_scan(path, "minmax")
            continue
        scan, read = read_scan(path, "minmax")
        assert np.allclose(sorted(scan.spacing), sorted(np.linalg.norm(affine[:3, :3], axis=0)), atol=1e-4)
        if usable or qform: assert np.allclose(header_affine(read)[0], affine, atol=2e-3)
        if affine is not OBLIQUE: continue
        write_label_map(back, scan.image > 0.5, read)
        written = type(header)(gzip.decompress(back.read_bytes())[:header.sizeof_hdr], check=False)
        assert all(np.array_equal(written[name], header[name], equal_nan=True) for name in GRID)
        assert np.array_equal(read_scan(back, "minmax")[0].image, scan.image > 0.5)
    assert tried


def test_whatever_a_header_says_the_outcome_is_a_scan_or_one_line(tmp_path):
    header, path, read, refused = flawed_header(nib.Nifti1Image, "<", STRAIGHT, "right", "right"), tmp_path/"a.nii", 0, 0
    for field, value in product(header.keys(), [0, -1, 3, 1e30, np.nan, np.inf, 32767, -32768]):
        broken = header.copy()
        with np.errstate(all="ignore"):
            try: broken[field] = value
            except (OverflowError, ValueError): continue
        path.write_bytes(broken.binaryblock + bytes(4) + bytes(range(210)))
        try: scan, back = read_scan(path, "minmax")
        except StudyError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).startswith(f"{path}: "), field
        else:
            read += 1
            if field in GRID: write_label_map(tmp_path/"b.nii", scan.image > 0.5, back)
    assert read > 150 and refused > 30, (read, refused)


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), MemoryError(), ZeroDivisionError("x"), nib.spatialimages.HeaderDataError("y"), AssertionError()])
def test_no_other_exception_leaves_the_reading(error, hearts, tmp_path, monkeypatch):
    def fail(*arguments, **settings): raise error
    nifti, prepared = find_cases(hearts)[0], tmp_path/"case0001.npz"
    np.savez(prepared, image=np.eye(4)[None], label=np.eye(4)[None])
    monkeypatch.setattr(np, "frombuffer", fail)
    for read in (lambda: read_volume(nifti, "minmax"), lambda: read_scan(nifti.image), lambda: read_volume(Case("a", "a", prepared, prepared), "unit")):
        with pytest.raises(StudyError) as caught: read()
        assert "\n" not in str(caught.value) and ": " in str(caught.value)


# --- anatomy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis, words", [(0, "lie below the kidneys"), (1, "lies behind the aorta"), (2, "to the right of")])
def test_anatomy_that_contradicts_the_header_is_named_by_case(abdomens, tmp_path, axis, words):
    for case in find_cases(abdomens):
        files = {}
        for name in ("image", "label"):
            source = nib.load(getattr(case, name))
            files[name] = tmp_path/f"{case.name}_{name}.nii.gz"
            nib.save(nib.Nifti1Image(np.flip(np.asarray(source.dataobj), 2 - axis), source.affine), files[name])
        with pytest.raises(StudyError, match=f"{case.name}_label.nii.gz: the .*{words}"): read_volume(Case(case.name, case.name, **files), **RAW)


def test_the_orientation_is_that_of_all_cases_together(abdomens, tmp_path):
    "No case has more than two kinds of organ, so that none tells alone; together they do, and a damaged one does not matter"
    settings, cases = {"structures": synapse_structures, "label_map": "transunet"}, []
    for case, organs in zip(find_cases(abdomens), ([3, 4], [1, 8], [5, 7], [3, 5], [1, 2], [6, 7]), strict=True):
        volume = read_volume(case, **RAW)
        path = tmp_path/f"{case.name}.npy.h5"
        with h5py.File(path, "w") as file:
            file["image"], file["label"] = (stored(a, "SAL") for a in (volume.image, np.where(np.isin(volume.label, organs), volume.label, 0)))
        cases.append((Case(case.name, case.name, path, path), volume))
    (tmp_path/"case0099.npy.h5").write_bytes(b"damaged")
    bad = Case("case0099", "case0099", *[tmp_path/"case0099.npy.h5"]*2)
    assert {shared_orientation([case], **{k: settings[k] for k in ("label_map", "structures")}) for case, _ in cases} == {"auto"}
    code = shared_orientation([bad, *(case for case, _ in cases)], "transunet", synapse_structures)
    assert code == "SAL"
    for case, truth in cases: assert np.array_equal(read_volume(case, "unit", orientation=code, **settings).image, truth.image)


@pytest.mark.parametrize("name, axes", [("case0008.npy.h5", "SLP"), ("patient001_frame01.h5", "SPL")])
def test_transunets_own_orientation_where_no_organ_tells(tmp_path, name, axes):
    image = np.random.default_rng(0).random((3, 4, 5), np.float32)
    with h5py.File(tmp_path/name, "w") as file: file["image"], file["label"] = image, np.zeros(image.shape, np.uint8)
    volume = read_volume(Case("a", "a", tmp_path/name, tmp_path/name), "unit", structures=synapse_structures)
    assert np.array_equal(volume.image, image.transpose(0, 2, 1) if axes == "SLP" else image)


def test_keys_of_the_npz_family(tmp_path):
    "Image and label map of an ACDC slice may be called img and label, or image and mask"
    for number, names in enumerate((("img", "label"), ("image", "label"), ("image", "mask"))):
        np.savez(tmp_path/f"case_001_sliceED_{number}.npz", **dict(zip(names, (np.eye(4)*number, np.eye(4)), strict=True)))
    parts = tuple(sorted(tmp_path.iterdir()))
    volume = read_volume(Case("a", "a", parts[0], parts[0], parts=parts), "minmax")
    assert volume.image[:, 0, 0].tolist() == [0, 0.5, 1] and volume.label.sum() == 12


# --- labels with rounding, locks, padding -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32])
@pytest.mark.parametrize("top", [1, 3, 8, 13, 85])
def test_whole_labels_survive_a_slope(dtype, top, tmp_path):
    values = np.random.default_rng(0).integers(0, top + 1, (6, 7, 8)).astype(float)
    values.flat[:2] = 0, top
    files = [tmp_path/name for name in ("image.nii", "label.nii", "fractional.nii")]
    for path, array in zip(files, (np.arange(values.size).reshape(values.shape), values, values + 0.1), strict=True):
        image = nib.Nifti1Image(array.astype(float), np.diag([-1, -1, 1, 1]))
        image.set_data_dtype(dtype if path is not files[0] else np.float32)
        nib.save(image, path)
    volume = read_volume(Case("a", "a", *files[:2]), "minmax")
    assert np.array_equal(volume.label, values.transpose(2, 1, 0))
    assert all("saved with rounding" in note for note in volume.notes)
    with pytest.raises(StudyError, match="fractional"): read_volume(Case("a", "a", files[0], files[2]), "minmax")


def test_a_file_that_another_program_holds(tmp_path):
    "A lock does not matter, and where the user insists on locks it is called one"
    path = tmp_path/"patient001_frame01.h5"
    with h5py.File(path, "w") as file: file["image"] = file["label"] = np.eye(4)[None]
    case = Case("a", "a", path, path)
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert read_volume(case, "unit").image.shape == (1, 4, 4)
        code = f"from levit_study.data.volumes import *; from levit_study.data.layouts import Case; read_volume(Case('a', 'a', {str(path)!r}), 'unit')"
        run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HDF5_USE_FILE_LOCKING": "TRUE"}, capture_output=True, text=True)
        assert f"StudyError: {path}: another program holds this file open" in run.stderr


@pytest.mark.parametrize("padding", [-32768, -9999, -32767, -5000])
def test_padding_is_air(padding):
    hounsfield = np.random.default_rng(0).normal(0, 300, (4, 20, 20)).round()
    padded, air = hounsfield.copy(), hounsfield.copy()
    padded[:, :6], air[:, :6] = padding, -1000
    assert np.array_equal(scale_intensity(padded), scale_intensity(air))
    with pytest.raises(StudyError, match="integer overflow"): scale_intensity(padded.astype(np.int16).view(np.uint16))


def test_names_in_capitals(hearts, tmp_path):
    case = find_cases(hearts)[0]
    for name in ("image", "label"): (tmp_path/f"{name}.NII.GZ").write_bytes(getattr(case, name).read_bytes())
    capital = Case("a", "a", tmp_path/"image.NII.GZ", tmp_path/"label.NII.GZ")
    assert np.array_equal(read_volume(capital, "minmax").image, read_volume(case, "minmax").image)
    assert read_scan(capital.image, "minmax")[0].case == "image"
