"""The metrics against their reference implementations (MONAI, MedPy): on real cardiac masks where
they are at hand, on made-up ones everywhere."""
import os
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, map_coordinates

from levit_study.evaluation.metrics import case_metrics, surface_distances
from levit_study.training.scores import dice_from_counts, jaccard_from_counts, overlap_counts

STRUCTURES = {"right ventricle": 1, "myocardium": 2, "left ventricle": 3}
SHARED = Path(__file__).parents[2] / "shared/data/acdc"
ACDC = Path(os.environ.get("LEVIT_STUDY_ACDC", SHARED))


def wobbled(labels, seed, pixels=1.5):
    "Bend `labels` smoothly in-plane: a stand-in for a network's prediction, Dice about 0.9"
    random = np.random.default_rng(seed)
    fields = [gaussian_filter(random.normal(size=labels.shape), (0, 6, 6)) for _ in range(2)]
    slices, rows, columns = np.indices(labels.shape).astype(float)
    shifts = [pixels * field / field.std() for field in fields]
    moved = [slices, *(axis + shift for axis, shift in zip((rows, columns), shifts, strict=True))]
    return map_coordinates(labels, moved, order=0)


def acdc_pairs(count):
    "Yield (prediction, reference) of `count` validation volumes"
    for seed, case in enumerate((ACDC / "val.list").read_text().split()[:count]):
        with h5py.File(ACDC / "data" / f"{case.removesuffix('.h5')}.h5") as file:
            labels = file["label"][:].astype(np.uint8)
        yield wobbled(labels, seed), labels


def made_up_pair(seed=0):
    "Return (prediction, reference) with blobs of three sizes"
    slices, rows, columns = np.indices((8, 48, 48))
    labels = np.zeros((8, 48, 48), np.uint8)
    for value, (row, column, radius) in enumerate([(15, 15, 9), (30, 32, 6), (10, 38, 3)], 1):
        squares = (2 * (slices - 4)) ** 2, (rows - row) ** 2, (columns - column) ** 2
        labels[sum(squares) <= radius**2] = value
    return wobbled(labels, seed), labels


def pairs():
    real = (ACDC / "val.list").is_file()
    return list(acdc_pairs(6)) if real else [made_up_pair(seed) for seed in range(6)]


def one_hot(labels):
    import torch
    values = 0, *STRUCTURES.values()
    return torch.from_numpy(np.stack([labels == value for value in values])[None])


def old_convention(prediction, reference):
    """The rule behind most published tables, from its description: pooled percentile, no spacing,
    1 and 0 for an invented structure, 0 and 0 otherwise"""
    from medpy.metric.binary import dc, hd95
    if prediction.any() and reference.any():
        return dc(prediction, reference), hd95(prediction, reference)
    return (1, 0) if prediction.any() else (0, 0)


def monai_hd95(prediction, reference, spacing):
    """MONAI's HD95 with the percentile taken in double precision: in single, as MONAI takes it, it
    is off by up to 1e-5, which the whole function is held to here"""
    import torch
    from monai.metrics import compute_hausdorff_distance
    from monai.metrics.utils import get_edge_surface_distance
    single = compute_hausdorff_distance(prediction, reference, percentile=95, spacing=spacing)
    double = torch.full(single.shape, torch.nan, dtype=torch.float64)
    for structure in range(single.shape[1]):
        masks = prediction[0, structure + 1], reference[0, structure + 1]
        if not all(mask.any() for mask in masks): continue
        both = {"spacing": spacing, "symmetric": True}
        _, distances, _ = get_edge_surface_distance(*masks, **both)
        double[0, structure] = max(torch.quantile(each.double(), .95) for each in distances)
        assert single[0, structure] == pytest.approx(float(double[0, structure]), rel=2e-5)
    return double


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (10.0, 1.37, 1.37), (2.5, 0.7, 0.9)])
def test_equal_to_monai(spacing):
    from monai.metrics import compute_average_surface_distance, compute_iou, compute_surface_dice
    tolerance = 2
    for prediction, reference in pairs():
        measured = case_metrics(prediction, reference, STRUCTURES, spacing)
        maps, mm = (one_hot(prediction), one_hot(reference)), {"spacing": spacing}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI warns of structures that are absent
            expected = {
                "hd95": monai_hd95(*maps, spacing),
                "asd": compute_average_surface_distance(*maps, symmetric=True, **mm),
                "nsd": compute_surface_dice(*maps, class_thresholds=[tolerance] * 3, **mm),
                "jaccard": compute_iou(*maps, include_background=False),
            }
        present = [row["voxels"] > 0 and row["predicted_voxels"] > 0 for row in measured]
        assert any(present)
        for name, values in expected.items():
            ours = np.array([row[name] for row in measured], dtype=float)[present]
            theirs = values[0].numpy().astype(float)[present]
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=name)


def test_equal_to_medpy():
    from medpy.metric import binary
    functions = {name: name for name in ("sensitivity", "specificity", "precision")}
    functions |= {"dice": "dc", "jaccard": "jc"}
    for prediction, reference in pairs():
        for row in case_metrics(prediction, reference, STRUCTURES, (8, 1.5, 1.5)):
            value = STRUCTURES[row["structure"]]
            masks = prediction == value, reference == value
            old = row["transunet_dice"], row["transunet_hd95"]
            np.testing.assert_allclose(old, old_convention(*masks), rtol=0, atol=1e-12)
            if row["voxels"] and row["predicted_voxels"]:
                for name, theirs in functions.items():
                    expected = getattr(binary, theirs)(*masks)
                    assert row[name] == pytest.approx(expected, abs=1e-12), name


def test_old_convention_of_absent_structures():
    blob, empty = np.zeros((3, 9, 9), bool), np.zeros((3, 9, 9), bool)
    blob[1, 3:6, 3:6] = True
    for prediction in (blob, empty):
        for reference in (blob, empty):
            row = case_metrics(prediction, reference, {"blob": 1})[0]
            old = row["transunet_dice"], row["transunet_hd95"]
            assert old == old_convention(prediction, reference)


def random_mask(seed):
    return np.random.default_rng(seed).random((3, 6, 7)) < .4


masks = st.integers(0, 2**32 - 1).map(random_mask)


@settings(max_examples=60, deadline=None)
@given(masks, masks)
def test_symmetry_range_and_surroundings(prediction, reference):
    """Swapping the maps swaps sensitivity and precision and leaves the rest; a wider field of view
    changes specificity and the diagonal alone"""
    def measured(*maps):
        return case_metrics(*maps, {"structure": 1}, (3, 1, .5))[0]

    def assert_same(names, other):
        for name in names:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-12, err_msg=name)
    one, swapped = measured(prediction, reference), measured(reference, prediction)
    assert_same(("dice", "jaccard", "hd95", "asd", "nsd"), swapped)
    np.testing.assert_equal(one["sensitivity"], swapped["precision"])
    for name in ("dice", "jaccard", "nsd", "sensitivity", "specificity", "precision"):
        assert 0 <= one[name] <= 1
    # Background around both maps stays outside the surfaces: the rim was surface before as well.
    wide = measured(np.pad(prediction, 2), np.pad(reference, 2))
    assert_same(one.keys() - {"structure", "unit", "specificity", "diagonal"}, wide)


@settings(max_examples=40, deadline=None)
@given(masks, masks)
def test_distances_by_brute_force(prediction, reference):
    from scipy.ndimage import binary_erosion
    from scipy.spatial.distance import cdist
    spacing = np.array((3, 1, .5))
    rims = [mask & ~binary_erosion(mask) for mask in (prediction, reference)]
    table = cdist(*(np.argwhere(rim) * spacing for rim in rims))
    one, other = surface_distances(prediction, reference, spacing)
    np.testing.assert_allclose(np.sort(one), np.sort(table.min(1)), atol=1e-12)
    np.testing.assert_allclose(np.sort(other), np.sort(table.min(0)), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(masks, masks, st.integers(0, 7), st.integers(0, 7))
def test_distances_within_slices_by_brute_force(prediction, reference, no_prediction, no_reference):
    """Without spacing: per slice, pooled; a slice that one map leaves empty counts up to the middle of
    the other's outline, and as wrong for the surface Dice"""
    from scipy.ndimage import binary_erosion
    from scipy.spatial.distance import cdist
    for mask, empty in ((prediction, no_prediction), (reference, no_reference)):
        mask[[place for place in range(3) if empty >> place & 1]] = False
    if not (prediction.any() and reference.any()): return
    distances, within = [[], []], []
    for pair in zip(prediction, reference, strict=True):
        rims = [np.argwhere(mask & ~binary_erosion(mask)) for mask in pair]
        for lists, rim, other in zip(distances, rims, rims[::-1], strict=True):
            if not len(rim): continue
            alone = not len(other)
            nearest = cdist(rim, [rim.mean(0)] if alone else other).min(1)
            lists += list(nearest)
            within += [not alone and distance <= 1 for distance in nearest]
    row = case_metrics(prediction, reference, {"structure": 1})[0]
    assert row["hd95"] == pytest.approx(max(np.percentile(lists, 95) for lists in distances))
    assert row["asd"] == pytest.approx(np.mean(sum(distances, [])))
    assert row["nsd"] == pytest.approx(np.mean(within))
    assert (row["unit"], row["diagonal"]) == ("pixel", pytest.approx(np.hypot(6, 7)))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64"])
def test_counts_agree_with_the_metrics(dtype):
    import torch
    prediction, reference = (labels.astype(dtype) for labels in made_up_pair())
    rows = case_metrics(prediction, reference, STRUCTURES)
    for convert in (np.asarray, torch.from_numpy):
        maps = convert(prediction), convert(reference)
        # How validation puts a volume together from its slices.
        summed = [each.sum(0) for each in overlap_counts(*maps, 4, by_slice=True)]
        for whole, parts in zip(overlap_counts(*maps, 4), summed, strict=True):
            np.testing.assert_array_equal(whole, parts)
        for name, measure in (("dice", dice_from_counts), ("jaccard", jaccard_from_counts)):
            from_counts = np.asarray(measure(*summed))[1:]
            np.testing.assert_allclose(from_counts, [row[name] for row in rows], rtol=1e-6)


def test_one_voxel_and_one_slice():
    dot = np.zeros((1, 1, 1), np.uint8)
    row = case_metrics(dot + 1, dot + 1, {"dot": 1}, (5, 1, 1))[0]
    assert (row["dice"], row["hd95"], row["asd"], row["nsd"]) == (1, 0, 0, 1)
    assert np.isnan(row["specificity"])  # nothing lies outside the structure
    flat = np.zeros((1, 8, 8), np.uint8)
    left, right = flat.copy(), flat.copy()
    left[0, 4, 1], right[0, 4, 5] = 1, 1
    row = case_metrics(left, right, {"dot": 1}, (5, 2, 3))[0]
    assert (row["dice"], row["hd95"], row["transunet_hd95"]) == (0, 12, 4)
