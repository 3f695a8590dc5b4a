"""A corpus of broken, odd and hostile data sets, each a folder made from a good one by one change.

`corpus[name]` holds what to make and what must come of it: 'error' (a StudyError that matches), 'warning' (a line of check_volume that matches) or
'reads' (the same volume as the good one). Every data set is a few kilobytes.
"""
import gzip
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from levit_study.data.labels import acdc_structures, synapse_structures

SHAPE = (12, 10, 8)                            # columns, rows, slices, as NIfTI stores them
AFFINE = np.diag([-1.5, -2.0, 3.0, 1.0])       # nibabel's millimetres: x runs to the left, y backwards, z upwards
CT = {"label_map": "btcv13", "structures": synapse_structures}
MR = {"intensity": "unit", "structures": acdc_structures}


@dataclass
class Kind:
    make: callable                             # writes the data set into a folder
    outcome: str                               # error, warning or reads
    match: str = ""                            # regular expression for the message
    names: str = ""                            # the file that the message must name
    settings: dict = field(default_factory=dict)


corpus = {}


def kind(outcome, match="", names="", **settings):
    def add(make):
        corpus[make.__name__] = Kind(make, outcome, match, names, settings)
        return make
    return add


# --- the good ones -------------------------------------------------------------------------------------------------------------------------------------


def ct_arrays():
    "Hounsfield units and BTCV labels (int16, uint8) with two kidneys and a liver, x to the left"
    label = np.zeros(SHAPE, np.uint8)
    label[2:4, 5:8, 1:5], label[8:10, 5:8, 1:5], label[1:6, 1:5, 4:8] = 2, 3, 6
    image = np.random.default_rng(0).normal(np.choose(label > 0, [-90, 120]), 15)
    return image.astype(np.int16), label


def save(path, array, affine=AFFINE, header=None, edit=None):
    "Write a NIfTI file; `edit` changes its header"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine, header)
    if edit: edit(image.header)
    nib.save(image, path)
    return path


def ct(folder, image=None, label=None):
    "A good BTCV data set of two cases; `image` and `label` replace the arrays of the second"
    for number in (1, 2):
        good = ct_arrays()
        if number == 2: good = (good[0] + np.int16(1), good[1])
        arrays = [new if number == 2 and new is not None else old for new, old in zip((image, label), good, strict=True)]
        save(folder/f"img/img{number:04d}.nii.gz", arrays[0])
        save(folder/f"label/label{number:04d}.nii.gz", arrays[1])
    return folder/"img/img0002.nii.gz", folder/"label/label0002.nii.gz"


def hearts():
    "Image in [0, 1] and ACDC labels (float32, uint8), (slice, row, column)"
    label = np.zeros((4, 16, 18), np.uint8)
    label[:, 4:12, 3:7], label[:, 4:12, 8:15], label[:, 6:10, 10:13] = 1, 2, 3
    return np.random.default_rng(1).random(label.shape, np.float32), label


def write_h5(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items(): file.create_dataset(name, data=array)
    return path


def ssl(folder, **replaced):
    "A good SSL4MIS data set: one patient as slices for training, one as volume for validation; `replaced` arrays go into the volume"
    image, label = hearts()
    names = [f"patient001_frame01_slice_{i + 1}" for i in range(len(image))]
    for name, plane, mask in zip(names, image, label, strict=True): write_h5(folder/f"data/slices/{name}.h5", image=plane, label=mask)
    (folder/"train_slices.list").write_text("\n".join(names) + "\n")
    (folder/"val.list").write_text("patient002_frame01\n")
    return write_h5(folder/"data/patient002_frame01.h5", **({"image": image, "label": label} | replaced))


def trans(folder):
    "A good data set in TransUNet's form, of hearts"
    image, label = hearts()
    for name in ("train", "valid"): (folder/name).mkdir(parents=True)
    for i, (plane, mask) in enumerate(zip(image, label, strict=True)):
        np.savez(folder/f"train/case_001_sliceED_{i}.npz", img=plane, label=mask)
        np.savez(folder/f"valid/case_002_sliceED_{i}.npz", img=plane, label=mask)
    return folder/"valid/case_002_sliceED_1.npz"


def patients(folder):
    "A good data set in the ACDC challenge's layout"
    image, label = hearts()
    for patient in ("patient001", "patient002"):
        for frame in ("01", "12"):
            base = folder/f"training/{patient}/{patient}_frame{frame}"
            save(base.with_name(base.name + ".nii.gz"), image.transpose(2, 1, 0))
            save(base.with_name(base.name + "_gt.nii.gz"), label.transpose(2, 1, 0))
        (folder/f"training/{patient}/Info.cfg").write_text("ED: 1\nES: 12\nGroup: NOR\n")
    return folder/"training/patient002"


def decathlon(folder, about=None):
    image, label = hearts()
    for name in ("heart_1", "heart_2"):
        save(folder/f"imagesTr/{name}_0000.nii.gz", image.transpose(2, 1, 0))
        save(folder/f"labelsTr/{name}.nii.gz", label.transpose(2, 1, 0))
    (folder/"dataset.json").write_text(json.dumps(about or {"labels": {"background": 0, "right ventricle": 1}, "file_ending": ".nii.gz"}))
    return folder/"dataset.json"


# --- files that are no scans ---------------------------------------------------------------------------------------------------------------------------


@kind("error", "file is empty", "img0002.nii.gz")
def zero_size_image(folder): ct(folder)[0].write_bytes(b"")

@kind("error", "file is empty", "label0002.nii.gz")
def zero_size_label(folder): ct(folder)[1].write_bytes(b"")

@kind("error", "file is empty", "img0002.nii.gz")
def gzip_of_nothing(folder): ct(folder)[0].write_bytes(gzip.compress(b""))

@kind("error", "damaged or incomplete gzip", "img0002.nii.gz")
def gzip_cut_in_the_middle(folder):
    path = ct(folder)[0]
    path.write_bytes(path.read_bytes()[:path.stat().st_size//2])

@kind("error", "damaged or incomplete gzip", "img0002.nii.gz")
def gzip_without_its_last_bytes(folder):
    path = ct(folder)[0]
    path.write_bytes(path.read_bytes()[:-3])

@kind("error", "damaged or incomplete gzip", "img0002.nii.gz")
def gzip_with_a_changed_byte(folder):
    path = ct(folder)[0]
    data = bytearray(path.read_bytes())
    data[len(data)*2//3] ^= 0x10
    path.write_bytes(data)

@kind("error", "incomplete: holds", "img0002.nii")
def plain_file_cut(folder):
    path = ct(folder)[0]
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes())[:-100])
    path.unlink()

@kind("error", "incomplete: holds|not a NIfTI", "img0002.nii.gz")
def header_cut(folder):
    path = ct(folder)[0]
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:200]))

@kind("error", "not a NIfTI", "img0002.nii.gz")
def text_file(folder): ct(folder)[0].write_text("version https://git-lfs.example/spec/v1\n" * 20)

@kind("error", "not a NIfTI", "img0002.nii.gz")
def web_page_instead_of_download(folder): ct(folder)[0].write_text("<!DOCTYPE html><html><body>Please log in</body></html>" + " "*600)

@kind("error", "not a NIfTI", "img0002.nii.gz")
def random_bytes(folder): ct(folder)[0].write_bytes(np.random.default_rng(0).bytes(5000))

@kind("error", "not a NIfTI", "img0002.nii.gz")
def dicom_file(folder): ct(folder)[0].write_bytes(b"\0"*128 + b"DICM" + b"\0"*2000)

@kind("error", "not a NIfTI", "img0002.nii.gz")
def header_of_an_img_hdr_pair(folder): patch(ct(folder)[0], 344, b"ni1\0")

@kind("error", "cannot be read", "img0002.nii.gz")
def folder_instead_of_file(folder):
    path = ct(folder)[0]
    path.unlink()
    path.mkdir()

@kind("error", "cannot be read", "img0002.nii.gz")
def dangling_link(folder):
    path = ct(folder)[0]
    path.unlink()
    path.symlink_to("nowhere.nii.gz")

@kind("error", "cannot be read", "img0002.nii.gz")
def link_loop(folder):
    path = ct(folder)[0]
    path.unlink()
    path.symlink_to(path.name)

@kind("error", "does not exist|cannot be listed|not a folder", "img")
def folder_link_loop(folder): (folder/"img").symlink_to("img")


# --- headers -------------------------------------------------------------------------------------------------------------------------------------------


def patch(path, at, data):
    "Change bytes of a gzipped NIfTI file"
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[at:at + len(data)] = data
    path.write_bytes(gzip.compress(bytes(raw)))

@kind("error", "not plain numbers", "img0002.nii.gz")
def complex_voxels(folder): save(ct(folder)[0], ct_arrays()[0].astype(np.complex64))

@kind("error", "not plain numbers", "img0002.nii.gz")
def colour_voxels(folder): save(ct(folder)[0], np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])))

@kind("error", "damaged NIfTI header|not plain numbers", "img0002.nii.gz")
def unknown_voxel_type(folder): patch(ct(folder)[0], 70, struct.pack("<h", 999))

@kind("error", "empty or beyond|damaged", "img0002.nii.gz")
def negative_size(folder): patch(ct(folder)[0], 42, struct.pack("<h", -5))

@kind("error", "empty or beyond", "img0002.nii.gz")
def size_of_terabytes(folder): patch(ct(folder)[0], 42, struct.pack("<hhh", 30000, 30000, 30000))

@kind("error", "damaged or incomplete|incomplete: holds", "img0002.nii.gz")
def more_voxels_declared_than_there_are(folder): patch(ct(folder)[0], 42, struct.pack("<hhh", 400, 400, 100))

@kind("error", "damaged NIfTI header", "img0002.nii.gz")
def data_offset_beyond_the_file(folder): patch(ct(folder)[0], 108, struct.pack("<f", 1e9))

@kind("error", "damaged NIfTI header", "img0002.nii.gz")
def data_offset_within_the_header(folder): patch(ct(folder)[0], 108, struct.pack("<f", 16))

@kind("error", "damaged NIfTI header", "img0002.nii.gz")
def infinite_rescale_slope(folder): patch(ct(folder)[0], 112, struct.pack("<f", np.inf))

@kind("error", "4D array .* where 3D", "img0002.nii.gz")
def film_instead_of_volume(folder): save(ct(folder)[0], np.stack([ct_arrays()[0]]*3, -1))

@kind("error", "2D array .* where 3D", "img0002.nii.gz")
def single_slice(folder): save(ct(folder)[0], ct_arrays()[0][:, :, 0])

@kind("error", "sheared affine", "img0002.nii.gz")
def sheared(folder): save(ct(folder)[0], ct_arrays()[0], AFFINE + np.eye(4, k=1)*0.4)

@kind("error", "not plausible", "img0002.nii.gz")
def voxel_size_zero(folder): patch(ct(folder)[0], 280, bytes(12))

@kind("error", "not plausible", "img0002.nii.gz")
def affine_of_nan(folder): patch(ct(folder)[0], 296, struct.pack("<4f", *[np.nan]*4))

@kind("error", "not plausible", "img0002.nii.gz")
def micrometres(folder): save(ct(folder)[0], ct_arrays()[0], np.diag([-1500, -2000, 3000, 1]))

@kind("error", "beside the image's grid", "label0002.nii.gz")
def label_on_a_shifted_grid(folder): save(ct(folder)[1], ct_arrays()[1], AFFINE + np.array([[0, 0, 0, 40]] + [[0]*4]*3))

@kind("error", "x 10 x 7 voxels for an image of 12 x 10 x 8", "label0002.nii.gz")
def label_of_another_shape(folder): ct(folder, label=ct_arrays()[1][:, :, 1:])

@kind("error", "voxels for an image of", "label0002.nii.gz")
def label_with_axes_swapped(folder): ct(folder, label=ct_arrays()[1].transpose(1, 0, 2))


# --- intensities ---------------------------------------------------------------------------------------------------------------------------------------


def with_value(value):
    image = ct_arrays()[0].astype(np.float32)
    image[3, 3, 3] = value
    return image

@kind("error", "1 voxels are NaN or infinite", "img0002.nii.gz")
def not_a_number(folder): ct(folder, with_value(np.nan))

@kind("error", "1 voxels are NaN or infinite", "img0002.nii.gz")
def infinite(folder): ct(folder, with_value(-np.inf))

@kind("error", "every voxel is -1000", "img0002.nii.gz")
def constant_image(folder): ct(folder, np.full(SHAPE, -1000, np.int16))

@kind("error", "integer overflow", "img0002.nii.gz")
def integer_overflow(folder): ct(folder, ct_arrays()[0].astype(np.uint16))

@kind("error", "rescale intercept was lost", "img0002.nii.gz")
def rescale_intercept_lost(folder): ct(folder, (ct_arrays()[0] + 1024).astype(np.uint16))

@kind("error", "scaled already", "img0002.nii.gz")
def scaled_twice(folder): ct(folder, ((ct_arrays()[0] + 125)/400).clip(0, 1).astype(np.float32))

@kind("error", "'unit' expects", "patient002_frame01.h5")
def not_scaled(folder): ssl(folder, image=hearts()[0]*900)


# --- label maps ----------------------------------------------------------------------------------------------------------------------------------------


def with_label(value, dtype=np.uint8):
    label = ct_arrays()[1].astype(dtype)
    label[5, 1, 1] = value
    return label

@kind("error", "label value 14 not among", "label0002.nii.gz")
def label_outside_the_map(folder): ct(folder, label=with_label(14))

@kind("error", "label value 300 not among", "label0002.nii.gz")
def label_beyond_a_byte(folder): ct(folder, label=with_label(300, np.uint16))

@kind("error", "label values from 0 to 70000", "label0002.nii.gz")
def label_beyond_two_bytes(folder): ct(folder, label=with_label(70000, np.int32))

@kind("error", "label values from -1", "label0002.nii.gz")
def negative_label(folder): ct(folder, label=with_label(-1, np.int16))

@kind("error", "fractional", "label0002.nii.gz")
def fractional_label(folder): ct(folder, label=with_label(2.5, np.float32))

@kind("error", "fractional", "label0002.nii.gz")
def label_resampled_linearly(folder): ct(folder, label=(ct_arrays()[1]*0.999).astype(np.float32))

@kind("error", "NaN or infinite", "label0002.nii.gz")
def label_not_a_number(folder): ct(folder, label=with_label(np.nan, np.float32))

@kind("error", "left kidney lies to the right", "label0002.nii.gz")
def label_flipped_left_to_right(folder): ct(folder, label=ct_arrays()[1][::-1])

@kind("error", "left kidney lies to the right", "label0002.nii.gz")
def kidneys_swapped(folder): ct(folder, label=np.array([0, 1, 3, 2, 4, 5, 6], np.uint8)[ct_arrays()[1]])

@kind("error", "left kidney lies to the right", "label0002.nii.gz")
def mirrored_affine(folder):
    for path, array in zip(ct(folder), ct_arrays(), strict=True): save(path, array, np.diag([1.5, -2.0, 3.0, 1.0]))

@kind("error", "left kidney lies to the right|spleen lies to the right", "img0002.nii.gz".replace("img", "label"), label_map="transunet")
def another_numbering(folder): ct(folder, label=np.array([0, 7, 3, 4, 0, 0, 5], np.uint8)[ct_arrays()[1]])

@kind("error", "left ventricle lies to the right", "patient002_frame01.h5")
def heart_flipped(folder):
    image, label = hearts()
    ssl(folder, image=image, label=label[:, :, ::-1])


# --- HDF5 ----------------------------------------------------------------------------------------------------------------------------------------------


@kind("error", "not a readable HDF5", "patient002_frame01.h5")
def zero_size_hdf5(folder): ssl(folder).write_bytes(b"")

@kind("error", "not a readable HDF5", "patient002_frame01.h5")
def hdf5_cut(folder):
    path = ssl(folder)
    path.write_bytes(path.read_bytes()[:3000])

@kind("error", "not a readable HDF5", "patient002_frame01.h5")
def npz_named_hdf5(folder):
    with ssl(folder).open("wb") as file: np.savez(file, image=hearts()[0])

@kind("error", "no array 'label' .has: image", "patient002_frame01.h5")
def hdf5_without_label(folder): write_h5(ssl(folder), image=hearts()[0])

@kind("error", "no array 'image' .has: data, seg", "patient002_frame01.h5")
def hdf5_with_other_keys(folder): write_h5(ssl(folder), data=hearts()[0], seg=hearts()[1])

@kind("error", "not an array of numbers", "patient002_frame01.h5")
def hdf5_group_instead_of_array(folder):
    with h5py.File(ssl(folder), "a") as file:
        del file["image"]
        file.create_group("image")

@kind("error", "not an array of numbers", "patient002_frame01.h5")
def hdf5_of_text(folder): ssl(folder, image="a picture")

@kind("error", "link to elsewhere", "patient002_frame01.h5")
def hdf5_link_to_another_file(folder):
    with h5py.File(ssl(folder), "a") as file:
        del file["image"]
        file["image"] = h5py.ExternalLink("/etc/passwd", "image")

@kind("error", "link to elsewhere", "patient002_frame01.h5")
def hdf5_link_to_itself(folder):
    with h5py.File(ssl(folder), "a") as file:
        del file["image"]
        file["image"] = h5py.SoftLink("/image")

@kind("error", "lies in another file", "patient002_frame01.h5")
def hdf5_with_data_elsewhere(folder):
    with h5py.File(ssl(folder), "a") as file:
        del file["image"]
        file.create_dataset("image", (4, 16, 18), "u1", external=[("/etc/passwd", 0, 1152)])

@kind("error", "lies in another file", "patient002_frame01.h5")
def hdf5_virtual_array(folder):
    path = ssl(folder)
    layout = h5py.VirtualLayout((4, 16, 18), "f4")
    layout[:] = h5py.VirtualSource(folder/"other.h5", "image", (4, 16, 18))
    with h5py.File(path, "a") as file:
        del file["image"]
        file.create_virtual_dataset("image", layout)

@kind("error", "empty or beyond", "patient002_frame01.h5")
def hdf5_of_terabytes(folder):
    with h5py.File(ssl(folder), "a") as file:
        del file["image"]
        file.create_dataset("image", (30000, 30000, 1000), "f4", chunks=(1, 1000, 1000), compression="gzip")

def claims(folder, name, *shape, **more):
    "An SSL4MIS data set whose volume has an array that was never written"
    with h5py.File(ssl(folder), "a") as file:
        del file[name]
        file.create_dataset(name, *shape, **more)

@kind("error", "'image' claims 67,108,864 bytes, of which the file holds 0", "patient002_frame01.h5")
def hdf5_never_written(folder): claims(folder, "image", (64, 512, 512), "f4")

@kind("error", "'label' claims 67,108,864 bytes, of which the file holds 0", "patient002_frame01.h5")
def hdf5_of_a_fill_value(folder): claims(folder, "label", (64, 512, 512), "f4", chunks=True, compression="gzip", fillvalue=1)

@kind("error", "'label' claims 1,073,741,824 bytes, of which the file holds 0", "patient002_frame01.h5")
def hdf5_in_pieces_of_gigabytes(folder): claims(folder, "label", (4, 16, 18), "u1", chunks=(1024, 1024, 1024), maxshape=(None,) * 3)

@kind("warning", "^empty label map$")
def hdf5_label_never_written(folder): claims(folder, "label", (4, 16, 18), "u1")

@kind("error", "2D array .* where 3D", "patient002_frame01.h5")
def hdf5_slice_for_a_volume(folder): ssl(folder, image=hearts()[0][0], label=hearts()[1][0])

@kind("error", "label map of 3 x 16 x 18 voxels for an image of 4", "patient002_frame01.h5")
def hdf5_of_two_shapes(folder): ssl(folder, label=hearts()[1][1:])

@kind("error", "slice of 15 x 18 pixels in a volume of 16 x 18", "patient001_frame01_slice_3.h5")
def slice_of_another_shape(folder):
    ssl(folder)
    write_h5(folder/"data/slices/patient001_frame01_slice_3.h5", image=hearts()[0][2, 1:], label=hearts()[1][2, 1:])

@kind("error", "label map of 16 x 17 pixels", "patient001_frame01_slice_3.h5")
def slice_with_label_of_another_shape(folder):
    ssl(folder)
    write_h5(folder/"data/slices/patient001_frame01_slice_3.h5", image=hearts()[0][2], label=hearts()[1][2, :, 1:])


# --- npz -----------------------------------------------------------------------------------------------------------------------------------------------


class Payload:
    "Leaves a mark when it is unpickled"
    def __reduce__(self): return (os.system, ("touch /tmp/levit-study-was-run",))

@kind("error", "pickled objects, refused", "case_002_sliceED_1.npz", intensity="unit")
def npz_with_pickled_objects(folder): np.savez(trans(folder), img=np.array([Payload()], object), label=hearts()[1][0])

@kind("error", "not a readable npz", "case_002_sliceED_1.npz")
def pickle_named_npz(folder): trans(folder).write_bytes(pickle.dumps(Payload()))

@kind("error", "not a readable npz", "case_002_sliceED_1.npz")
def npy_named_npz(folder):
    with trans(folder).open("wb") as file: np.save(file, hearts()[0][0])

@kind("error", "not a readable npz", "case_002_sliceED_1.npz")
def npz_cut(folder):
    path = trans(folder)
    path.write_bytes(path.read_bytes()[:700])

@kind("error", "not a readable npz", "case_002_sliceED_1.npz")
def zero_size_npz(folder): trans(folder).write_bytes(b"")

@kind("error", "no array 'label'", "case_002_sliceED_1.npz")
def npz_without_label(folder): np.savez(trans(folder), img=hearts()[0][0])

@kind("error", "not a readable npz .*CRC", "case_002_sliceED_1.npz")
def npz_with_a_changed_byte(folder):
    path = trans(folder)
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)

@kind("error", "empty or beyond", "case_002_sliceED_1.npz")
def npz_of_terabytes(folder):
    with zipfile.ZipFile(trans(folder), "w") as archive:
        with archive.open("img.npy", "w") as file: np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})

@kind("error", "not a readable npz", "case_002_sliceED_1.npz")
def npz_with_less_than_it_says(folder):
    with zipfile.ZipFile(trans(folder), "w") as archive:
        with archive.open("img.npy", "w") as file: np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (16, 18)})

@kind("error", "not a readable npz", "case_002_sliceED_1.npz")
def npz_with_code_in_its_header(folder):
    with zipfile.ZipFile(trans(folder), "w") as archive:
        text = b"__import__('os').system('touch /tmp/levit-study-was-run')"
        archive.writestr("img.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)


# --- folders and lists ---------------------------------------------------------------------------------------------------------------------------------


@kind("error", "does not exist: put your scans there, as .*RawData/Training", "")
def no_folder(folder): folder.rmdir()

@kind("error", "is empty: put your scans there", "")
def empty_folder(folder): pass

@kind("error", "is not a folder", "")
def file_instead_of_folder(folder):
    folder.rmdir()
    folder.write_text("x")

@kind("error", "no scans in a layout known here: put your scans there", "")
def folder_of_something_else(folder): (folder/"holiday.jpg").write_bytes(b"x")

@kind("error", "images but no label maps: put your scans there", "")
def images_without_any_label(folder):
    for path in (*ct(folder)[1].parent.iterdir(),): path.unlink()

@kind("error", "no label map for this image", "img0002.nii.gz")
def image_without_label(folder): ct(folder)[1].unlink()

@kind("error", "no image for this label map", "label0002.nii.gz")
def label_without_image(folder): ct(folder)[0].unlink()

@kind("error", "a second file for case 0002", "img0002.nii.gz")
def image_twice(folder): save(ct(folder)[0].with_name("img0002.nii"), ct_arrays()[0])

@kind("error", "in the layouts .*: set layout", "")
def two_layouts(folder):
    ct(folder)
    patients(folder)

@kind("error", "listed but absent", "patient002_frame01")
def listed_but_absent(folder): ssl(folder).unlink()

@kind("error", "listed but absent", "patient001_frame01_slice_2")
def slice_listed_but_absent(folder):
    ssl(folder)
    (folder/"data/slices/patient001_frame01_slice_2.h5").unlink()

@kind("error", "is in no list", "patient003_frame01.h5")
def unlisted(folder): write_h5(ssl(folder).with_name("patient003_frame01.h5"), image=hearts()[0], label=hearts()[1])

@kind("error", "slice_9 is in no list|in no list", "patient001_frame01_slice_9.h5")
def unlisted_slice(folder):
    ssl(folder)
    write_h5(folder/"data/slices/patient001_frame01_slice_9.h5", image=hearts()[0][0], label=hearts()[1][0])

@kind("error", "patient002 is in two splits", "")
def patient_in_two_splits(folder):
    ssl(folder)
    (folder/"train.list").write_text("patient002_frame02\n")
    write_h5(folder/"data/patient002_frame02.h5", image=hearts()[0], label=hearts()[1])

@kind("error", "list it once", "")
def volume_in_two_lists(folder):
    ssl(folder)
    (folder/"test.list").write_text("patient002_frame01\n")

@kind("error", "is not a file name", "val.list")
def list_that_points_elsewhere(folder):
    ssl(folder)
    (folder/"val.list").write_text("../../etc/passwd\n")

@kind("error", "named in Info.cfg but absent", "patient002_frame12.nii.gz")
def frame_absent(folder):
    for path in patients(folder).glob("*frame12*"): path.unlink()

@kind("error", "no label map for this image", "patient002_frame12.nii.gz")
def frame_without_label(folder): (patients(folder)/"patient002_frame12_gt.nii.gz").unlink()

@kind("error", "holds no patient002_frame", "patient002")
def patient_without_frames(folder):
    for path in patients(folder).iterdir(): path.unlink()

@kind("error", "not a JSON file", "dataset.json")
def damaged_json(folder): decathlon(folder).write_text('{"labels": {')

@kind("error", "listed in dataset.json but absent", "heart_7.nii.gz")
def json_lists_what_is_absent(folder): decathlon(folder, {"training": [{"image": "./imagesTr/heart_7.nii.gz", "label": "./labelsTr/heart_7.nii.gz"}]})

@kind("error", "no list of folds", "splits_final.json")
def damaged_splits(folder): (decathlon(folder).parent/"splits_final.json").write_text('[{"train": ["heart_1"]}]')

@kind("error", "no list of folds", "splits_final.json")
def splits_of_letters(folder): (decathlon(folder).parent/"splits_final.json").write_text('[{"train": "heart_1", "val": ["heart_2"]}]')

@kind("error", "case heart_1 is in train and in val", "splits_final.json")
def case_in_train_and_val(folder): (decathlon(folder).parent/"splits_final.json").write_text('[{"train": ["heart_1"], "val": ["heart_1", "heart_2"]}]')

@kind("error", "not a JSON file", "dataset.json")
def number_without_end(folder): decathlon(folder).write_text('{"numTraining": ' + "1" * 5000 + "}")

@kind("error", "several channels", "heart_2_0001.nii.gz")
def several_channels(folder): save(decathlon(folder).parent/"imagesTr/heart_2_0001.nii.gz", hearts()[0].transpose(2, 1, 0))


@kind("error", "this is DICOM; .* dcm2niix", "IM0001")
def dicom_folder(folder):
    (folder/"study/series").mkdir(parents=True)
    (folder/"study/series/IM0001").write_bytes(b"\0"*128 + b"DICM" + b"\0"*2000)

@kind("error", "this is NRRD; .* SimpleITK", "scan.nrrd")
def nrrd_files(folder): (folder/"scan.nrrd").write_bytes(b"NRRD0004\n")

@kind("error", "not text in UTF-8 or UTF-16", "val.list")
def list_that_is_packed(folder):
    ssl(folder)
    (folder/"val.list").write_bytes(gzip.compress(b"patient002_frame01\n", mtime=0))

@kind("error", "nested too deeply", "dataset.json")
def bottomless_json(folder): decathlon(folder).write_text("[" * 100_000)

@kind("error", "an unusual character in its name: rename it", "labelsTr")
def a_line_break_in_a_name(folder):
    labels = decathlon(folder).parent/"labelsTr"
    (labels/"heart_2.nii.gz").rename(labels/"heart\n2.nii.gz")

@kind("error", "holds data sets in .*: set data.folder", "")
def two_data_sets(folder):
    for name in ("first", "second"): ct(folder/name)


# --- what is read, with a warning ----------------------------------------------------------------------------------------------------------------------


@kind("warning", "^empty label map$")
def empty_label(folder): ct(folder, label=np.zeros(SHAPE, np.uint8))

@kind("warning", "^no liver$")
def label_missing(folder): ct(folder, label=np.where(ct_arrays()[1] == 6, 0, ct_arrays()[1]).astype(np.uint8))

@kind("warning", "1 constant slice .first: 2")
def constant_slice(folder):
    image = ct_arrays()[0]
    image[:, :, 2] = 5
    ct(folder, image)

@kind("warning", "liver: encloses 4 background voxels")
def label_with_holes(folder):
    label = ct_arrays()[1]
    label[3, 3, :] = 0
    ct(folder, label=label)

@kind("warning", "odd orientation")
def slices_along_another_axis(folder):
    turned = AFFINE[:, [0, 2, 1, 3]]
    for path, array in zip(ct(folder), ct_arrays(), strict=True): save(path, array.transpose(0, 2, 1), turned)

@kind("warning", "oblique by 10 degrees")
def oblique(folder):
    c, s = np.cos(np.radians(10)), np.sin(np.radians(10))
    turn = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for path, array in zip(ct(folder), ct_arrays(), strict=True): save(path, array, turn @ AFFINE)

@kind("warning", "gives no orientation")
def no_orientation(folder):
    for path, array in zip(ct(folder), ct_arrays(), strict=True):
        save(path, array[:, ::-1])  # NIfTI's default: x runs to the left, y forwards
        patch(path, 252, bytes(4))

@kind("warning", "two affines .* disagree")
def affines_disagree(folder):
    for path, array in zip(ct(folder), ct_arrays(), strict=True):
        save(path, array, edit=lambda header: header.set_qform(np.diag([1.5, -2.0, 3.0, 1.0]), 1))

@kind("warning", "off the image's by 0.4 mm")
def label_a_little_beside(folder): save(ct(folder)[1], ct_arrays()[1], AFFINE + np.array([[0, 0, 0, 0.4]] + [[0]*4]*3))


# --- what is odd and read right ------------------------------------------------------------------------------------------------------------------------


@kind("reads")
def big_endian(folder):
    for path, array in zip(ct(folder), ct_arrays(), strict=True): save(path, array.astype(">i2"), header=nib.Nifti1Header(endianness=">"))

@kind("reads")
def labels_in_16_bits(folder): ct(folder, ct_arrays()[0], ct_arrays()[1].astype(np.uint16))

@kind("reads")
def labels_as_whole_floats(folder): ct(folder, ct_arrays()[0], ct_arrays()[1].astype(np.float64))

@kind("reads")
def rescale_slope_and_intercept(folder): save(ct(folder)[0], ((ct_arrays()[0] + 1024)*2).astype(np.uint16), edit=lambda h: h.set_slope_inter(0.5, -1024))

@kind("reads")
def trailing_axis_of_one(folder): ct(folder, ct_arrays()[0][..., None], ct_arrays()[1][..., None])

@kind("reads")
def gzip_that_is_none(folder):
    path = ct(folder, ct_arrays()[0])[0]
    path.write_bytes(gzip.decompress(path.read_bytes()))

@kind("reads")
def nifti_2(folder):
    for path, array in zip(ct(folder), ct_arrays(), strict=True): nib.save(nib.Nifti2Image(array, AFFINE), path)

@kind("reads")
def stored_right_anterior(folder):
    back = AFFINE @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, -1, 0, SHAPE[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    for path, array in zip(ct(folder), ct_arrays(), strict=True): save(path, array[::-1, ::-1], back)

@kind("reads")
def label_stored_unlike_the_image(folder):
    back = AFFINE @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, -1, SHAPE[2] - 1], [0, 0, 0, 1]])
    save(ct(folder, ct_arrays()[0])[1], ct_arrays()[1][::-1, :, ::-1], back)

@kind("reads")
def linked_into_the_folder(folder):
    path = ct(folder, ct_arrays()[0])[0]
    path.rename(folder/"cache")
    path.symlink_to(Path("..")/"cache")

@kind("reads")
def extension_in_the_header(folder):
    image = nib.Nifti1Image(ct_arrays()[0], AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"scanned somewhere" * 20))
    nib.save(image, ct(folder)[0])

@kind("reads")
def in_capital_letters(folder):
    ct(folder, ct_arrays()[0])
    for path in sorted(folder.rglob("*"), reverse=True): path.rename(path.with_name(path.name.upper()))

@kind("reads")
def some_folders_down(folder): ct(folder/"download/Abdomen/RawData/Training", ct_arrays()[0])

@kind("reads")
def files_that_do_not_belong(folder):
    ct(folder, ct_arrays()[0])
    (folder/"img/.DS_Store").write_bytes(b"x")
    (folder/"img/._img0003.nii.gz").write_bytes(b"x")
    (folder/"img/notes.txt").write_text("x")


# --- headers that contradict themselves, and what nibabel is too strict for ----------------------------


def edit(path, **fields):
    "Change fields of a gzipped NIfTI file's header, whatever sense they make"
    raw = gzip.decompress(path.read_bytes())
    header = nib.Nifti1Header(raw[:348], check=False)
    for name, value in fields.items(): header[name] = value
    path.write_bytes(gzip.compress(header.binaryblock + raw[348:]))


def odd_headers(folder, affine=AFFINE, qform=None, **fields):
    "A good data set of which both files of the second case have these header fields"
    for path, array in zip(ct(folder), ct_arrays(), strict=True):
        save(path, array, affine, edit=lambda h: qform is not None and h.set_qform(qform, 1))
        edit(path, **fields)

def rows(a, b, c): return {"srow_x": [a, 0, 0, 0], "srow_y": [0, b, 0, 0], "srow_z": [0, 0, c, 0]}


@kind("warning", "affine contradicts its voxel size .pixdim.: the size is pixdim's")
def size_in_pixdim_alone(folder): odd_headers(folder, **rows(-1, -1, 1))

@kind("warning", "sform contradicts its voxel size .pixdim.: the qform is used")
def sform_without_size_beside_a_qform(folder): odd_headers(folder, qform=AFFINE, **rows(-1, -1, 1))

@kind("warning", "sform is not valid: the qform is used")
def sform_of_zeros_beside_a_qform(folder): odd_headers(folder, qform=AFFINE, **rows(0, 0, 0))

@kind("warning", "sform is not valid: the qform is used")
def sform_not_finite_beside_a_qform(folder): odd_headers(folder, qform=AFFINE, srow_y=[np.nan]*4)

@kind("warning", "sform is not valid: the qform is used")
def sheared_sform_beside_a_qform(folder): odd_headers(folder, qform=AFFINE, srow_x=[-1.5, 0.7, 0, 0])

@kind("warning", "qform is not valid: the sform is used")
def quaternion_beyond_repair(folder): odd_headers(folder, qform=AFFINE, quatern_b=3)

@kind("warning", "qform is not valid: the sform is used")
def quaternion_not_a_number(folder): odd_headers(folder, qform=AFFINE, quatern_c=np.nan)

@kind("warning", "voxel size .pixdim. is not valid: the affine's is used")
def pixdim_of_zeros(folder): odd_headers(folder, pixdim=[1, 0, 0, 0, 0, 0, 0, 0])

@kind("warning", "voxel size .pixdim. is not valid: the affine's is used")
def pixdim_not_a_number(folder): odd_headers(folder, pixdim=[1, 1.5, np.nan, 3, 0, 0, 0, 0])

@kind("error", "voxel size 0 x 0 x 0 mm is not plausible", "0002.nii.gz")
def pixdim_of_zeros_and_a_qform(folder): odd_headers(folder, None, AFFINE, pixdim=[1, 0, 0, 0, 0, 0, 0, 0])

@kind("error", "not plausible", "0002.nii.gz")
def quaternion_beyond_repair_alone(folder): odd_headers(folder, None, AFFINE, quatern_b=3)

@kind("reads")
def quaternion_a_little_too_long(folder): odd_headers(folder, qform=AFFINE, quatern_d=1.000004)

@kind("reads")
def quaternion_a_little_too_long_alone(folder): odd_headers(folder, None, AFFINE, quatern_d=1.000004)

@kind("reads")
def qfac_of_zero(folder): odd_headers(folder, None, AFFINE, pixdim=[0, 1.5, 2, 3, 0, 0, 0, 0])

@kind("reads")
def qfac_not_a_number(folder): odd_headers(folder, None, AFFINE, pixdim=[np.nan, 1.5, 2, 3, 0, 0, 0, 0])

@kind("reads")
def pixdim_negative(folder): odd_headers(folder, None, AFFINE, pixdim=[1, -1.5, 2, -3, 0, 0, 0, 0])

@kind("reads")
def sform_code_unknown_beside_a_qform(folder): odd_headers(folder, qform=AFFINE, sform_code=77, **rows(9, 9, 9))


# --- labels with rounding, padding, anatomy, names -----------------------------------------------------


def rescaled_labels(folder, dtype, change=lambda label: label):
    "The second case's label map as an array of floats that nibabel scales into `dtype`"
    path = ct(folder, ct_arrays()[0])[1]
    label = change(ct_arrays()[1].astype(np.float64))
    label[0, 0, 0] = 13   # a raw label that becomes background; it makes the scale coarser
    image = nib.Nifti1Image(label, AFFINE)
    image.set_data_dtype(dtype)
    nib.save(image, path)

@kind("warning", "saved with rounding")
def labels_rescaled_into_16_bits(folder): rescaled_labels(folder, np.int16)

@kind("warning", "saved with rounding")
def labels_rescaled_into_8_bits(folder): rescaled_labels(folder, np.int8)

@kind("warning", "saved with rounding")
def labels_a_hair_off(folder): ct(folder, label=ct_arrays()[1]*np.float32(0.99999))

@kind("error", "fractional", "label0002.nii.gz")
def labels_rescaled_and_resampled(folder): rescaled_labels(folder, np.int16, lambda label: label*0.9)

@kind("error", "rescale intercept was lost", "img0002.nii.gz")
def padding_and_no_intercept(folder):
    image = ct_arrays()[0] + np.int16(1024)
    image[0] = -32768
    ct(folder, image)

@kind("error", "liver and spleen lie below the kidneys", "label0002.nii.gz")
def upside_down(folder): ct(folder, *(array[:, :, ::-1] for array in ct_arrays()))

@kind("error", "stomach lies behind the aorta and kidneys", "label0002.nii.gz")
def front_to_back(folder):
    image, label = ct_arrays()
    label[6:8, 0:2, 2:6] = 7
    ct(folder, image[:, ::-1], label[:, ::-1])

@kind("error", "another program holds this file open", "patient002_frame01.h5")
def hdf5_that_a_program_left_open(folder):
    code = "import h5py, os, sys; f = h5py.File(sys.argv[1], 'a', libver='latest'); f.flush(); os._exit(0)"
    path = ssl(folder)
    arrays = hearts()
    with h5py.File(path, "w", libver="latest") as file: file["image"], file["label"] = arrays
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
