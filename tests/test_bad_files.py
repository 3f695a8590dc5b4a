"""Bad input: each of a corpus of broken, odd and hostile data sets ends in one clear line, in a warning, or is read right. None crashes or passes unseen."""
import gzip
import re
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bad_files import CT, MR, corpus, ct, ct_arrays, decathlon, ssl, trans
from levit_study.files import StudyError
from levit_study.data.nifti import write_label_map
from levit_study.data.labels import label_table, map_labels
from levit_study.data.volumes import check_volume, read_scan, read_volume, scale_intensity
from levit_study.data.layouts import find_cases
from levit_study.data.prepare import prepare
from levit_study.data.splits import split_cases
from levit_study.evaluation.targets import _has_channels
from levit_study.params import Data

MARK = Path("/tmp/levit-study-was-run")


def read_all(folder, settings):
    "Read a data set as preparation does, bad cases skipped; return the volumes and warnings, or raise what the first bad case raised"
    volumes, lines, errors = [], [], []
    for case in find_cases(folder):
        ct_like = case.name.startswith("case0")
        settings = (CT if ct_like else MR) | settings
        try: volumes.append(read_volume(case, **settings))
        except StudyError as error: errors.append(error)
        else: lines += check_volume(volumes[-1], {"left kidney": 3, "right kidney": 4, "liver": 5} if ct_like else settings["structures"])
    if errors: raise errors[0]
    return volumes, lines


@pytest.mark.parametrize("name", corpus)
def test_kind(name, tmp_path):
    kind, folder = corpus[name], tmp_path/"data"
    folder.mkdir()
    kind.make(folder)
    if kind.outcome == "error":
        with pytest.raises(StudyError) as caught: read_all(folder, kind.settings)
        line = str(caught.value)
        assert "\n" not in line and len(line) < 1000, line
        assert re.search(kind.match, line), line
        assert kind.names in line and line.count(": ") >= 2 - (kind.names == ""), line
    else:
        volumes, lines = read_all(folder, kind.settings)
        if kind.outcome == "warning": assert any(re.search(kind.match, line) for line in lines), lines
        else:
            image, label = ct_arrays()
            assert np.array_equal(volumes[-1].label, label_map(label.transpose(2, 1, 0)))
            assert np.abs(volumes[-1].image - scale_intensity(image.transpose(2, 1, 0))).max() < 0.003
            assert volumes[-1].spacing == (3.0, 2.0, 1.5)
            assert not lines, lines
    assert not MARK.exists(), "a file was executed"


def label_map(label): return map_labels(label, label_table("btcv13"))


def test_the_corpus_is_broad():
    outcomes = [kind.outcome for kind in corpus.values()]
    assert outcomes.count("error") >= 60 and outcomes.count("warning") >= 8 and outcomes.count("reads") >= 8


# --- damage at random places ---------------------------------------------------------------------------------------------------------------------------


def damaged(data, rng):
    "Bytes with one of: a cut, changed bytes, a hole of zeros, a doubled piece"
    data, at = bytearray(data), int(rng.integers(len(data)))
    how = rng.integers(4)
    if how == 0: return bytes(data[:at])
    if how == 1:
        for place in rng.integers(min(len(data), 600), size=rng.integers(1, 9)): data[place] = rng.integers(256)
    if how == 2: data[at:at + 40] = bytes(len(data[at:at + 40]))
    if how == 3: data[at:at] = data[at:at + 100]
    return bytes(data)


@pytest.mark.parametrize("form, unpacked", [("nifti", True), ("nifti", False), ("hdf5", False), ("npz", False)])
def test_random_damage_never_crashes(form, unpacked, tmp_path):
    "Whatever is damaged, the outcome is a volume or one StudyError; 150 damages each"
    path = {"nifti": lambda: ct(tmp_path)[0], "hdf5": lambda: ssl(tmp_path), "npz": lambda: trans(tmp_path)}[form]()
    good, rng, errors = path.read_bytes(), np.random.default_rng(5), 0
    if unpacked: good = gzip.decompress(good)
    settings = CT if form == "nifti" else MR
    for _ in range(150):
        path.write_bytes(damaged(good, rng))
        case = next(case for case in find_cases(tmp_path) if path in (case.image, *case.parts))
        try: read_volume(case, **settings)
        except StudyError as error:
            errors += 1
            assert "\n" not in str(error) and ": " in str(error)
    assert errors > 50


# --- splits and writing --------------------------------------------------------------------------------------------------------------------------------


def test_skipping_leaves_the_rest(tmp_path):
    ct(tmp_path, label=ct_arrays()[1][:, :, 1:])
    good, bad = find_cases(tmp_path)
    assert read_volume(good, **CT).image.shape == (8, 10, 12)
    with pytest.raises(StudyError, match="label0002"): read_volume(bad, **CT)
    with pytest.raises(StudyError, match="no case is left for .valid."): split_cases([good], "fraction")


@pytest.mark.parametrize("name", ["out.txt", "out.nii.gz.part", "out.mha"])
def test_unknown_ending_is_refused(name, tmp_path):
    scan, header = read_scan(ct(tmp_path)[0])
    with pytest.raises(StudyError, match="written as .nii or .nii.gz"): write_label_map(tmp_path/name, scan.image > 0.5, header)
    assert not (tmp_path/name).exists()


def test_unwritable_output_is_one_line(tmp_path):
    scan, header = read_scan(ct(tmp_path)[0])
    (tmp_path/"file").write_text("in the way")
    with pytest.raises(StudyError, match="cannot be written"): write_label_map(tmp_path/"file/out.nii.gz", scan.image > 0.5, header)


def test_full_disk_leaves_nothing_half_written(tmp_path):
    "A limit on the size of files stands in for a full disk"
    code = f"""
import resource, numpy as np
from levit_study.files import StudyError
from levit_study.data.nifti import write_label_map
from levit_study.data.volumes import read_scan
scan, header = read_scan({str(ct(tmp_path)[0])!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try: write_label_map({str(tmp_path/'out.nii')!r}, scan.image > 0.5, header)
except StudyError as error: print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "out.nii: cannot be written" in run.stdout and run.stdout.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


def test_label_map_goes_back_onto_an_odd_grid(tmp_path):
    "Big-endian, stored along other axes, oblique: what is written lies voxel by voxel on what was read"
    image = ct_arrays()[0]
    affine = np.array([[0, 0.2, -2.99, 5], [1.5, 0, 0, -7], [0, 1.99, 0.3, 60], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(image.astype(">i2"), affine, nib.Nifti1Header(endianness=">")), tmp_path/"a.nii.gz")
    scan, header = read_scan(tmp_path/"a.nii.gz")
    write_label_map(tmp_path/"b.nii.gz", scan.image > 0.5, header)
    written = nib.load(tmp_path/"b.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj) > 0, image > 75)
    assert np.allclose(written.affine, affine, atol=1e-4) and written.get_data_dtype() == np.uint8


def test_memory_stays_bounded_whatever_a_header_says(tmp_path):
    "A file of a few bytes that claims gigabytes is refused without asking for them"
    path = ct(tmp_path)[0]
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[42:48] = np.array([2000, 2000, 100], "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(StudyError, match="incomplete"): read_scan(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_counting_a_files_channels_reads_no_extension(tmp_path):
    "What lies before the voxels may be as long as the file"
    image, path = nib.Nifti1Image(np.zeros((2, 3, 4, 2)), None), tmp_path/"scan.nii.gz"
    image.header["vox_offset"] = 2**24
    head = image.header.binaryblock + b"\1\0\0\0" + (2**24 - 352).to_bytes(4, "little")
    path.write_bytes(gzip.compress(head + bytes(2**25)))
    tracemalloc.start()
    assert _has_channels(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_a_case_may_have_any_letters_in_its_name(tmp_path):
    decathlon(tmp_path / "raw")
    for path in (tmp_path / "raw").rglob("heart_2*"): path.rename(path.with_name(path.name.replace("heart_2", "müller")))
    path = tmp_path / "raw/imagesTr/müller_0000.nii.gz"   # another patient's image
    image = nib.load(path)
    nib.save(nib.Nifti1Image(image.get_fdata()[::-1].astype(np.float32), image.affine), path)
    data = {"folder": str(tmp_path / "raw"), "structures": {"a": 1, "b": 2, "c": 3}, "size": 32, "split": {"kind": "fraction", "valid": .5}}
    manifest = prepare(Data.model_validate(data), tmp_path / "store.h5", tmp_path / "manifest.json", progress=False)
    assert set(manifest["cases"]) == {"heart_1", "müller"}
