"""How long the metrics of a volume take, against MedPy and MONAI: processor time of one thread,
alternating, the same masks.

    python benchmarks/metrics.py [--acdc FOLDER] [--volumes 10]

Without ACDC (folder with val.list and data/) made-up hearts of the same size stand in. Predictions
are the reference bent smoothly, as a network's are wrong, and with 5 % of the voxels at random, as
those of an untrained network may be.
"""
import argparse
import os
import time
import warnings
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before NumPy is imported

import h5py
import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from levit_study.evaluation.metrics import case_metrics
from levit_study.training.scores import overlap_counts

STRUCTURES = {"right ventricle": 1, "myocardium": 2, "left ventricle": 3}
SPACING = (10.0, 1.4, 1.4)


def bent(labels, random, pixels=1.5):
    fields = [gaussian_filter(random.normal(size=labels.shape), (0, 6, 6)) for _ in range(2)]
    slices, rows, columns = np.indices(labels.shape).astype(float)
    shifts = [pixels * field / field.std() for field in fields]
    moved = [slices, *(axis + shift for axis, shift in zip((rows, columns), shifts, strict=True))]
    return map_coordinates(labels, moved, order=0)


def noisy(labels, random):
    wrong = random.random(labels.shape) < .05
    return np.where(wrong, random.integers(0, 4, labels.shape), labels).astype(np.uint8)


def hearts(count):
    "Yield made-up label maps of ACDC's size: a ring with its cavity, and a crescent beside"
    rows, columns = np.mgrid[:216, :256]
    for size in np.linspace(.8, 1.2, count):
        labels = np.zeros((10, 216, 256), np.uint8)
        for index in range(10):
            radius = 28 * size * (1 - index / 14)
            distance = np.hypot(rows - 108, columns - 128)
            labels[index][np.hypot(rows - 105, columns - 100) < 1.2 * radius] = 1
            labels[index][distance < radius] = 2
            labels[index][distance < .65 * radius] = 3
        yield labels


def volumes(folder, count):
    "Yield the label maps of `count` volumes of ACDC if `folder` has them, else made-up hearts"
    if not folder or not (folder / "val.list").is_file():
        yield from hearts(count)
        return
    for case in (folder / "val.list").read_text().split()[:count]:
        with h5py.File(folder / "data" / f"{case.removesuffix('.h5')}.h5") as file:
            yield file["label"][:].astype(np.uint8)


def ours(prediction, reference):
    return case_metrics(prediction, reference, STRUCTURES, SPACING)


def ours_counts(prediction, reference):
    return overlap_counts(prediction, reference, 4)


def medpy_two(prediction, reference):
    from medpy.metric.binary import dc, hd95
    for value in STRUCTURES.values():
        masks = prediction == value, reference == value
        dc(*masks), hd95(*masks, SPACING)


def medpy_four(prediction, reference):
    from medpy.metric.binary import assd, dc, hd95, jc
    for value in STRUCTURES.values():
        masks = prediction == value, reference == value
        dc(*masks), jc(*masks), hd95(*masks, SPACING), assd(*masks, SPACING)


def monai_four(prediction, reference):
    import torch
    from monai import metrics
    values = 0, *STRUCTURES.values()
    maps = [
        torch.from_numpy(np.stack([labels == value for value in values])[None])
        for labels in (prediction, reference)
    ]
    metrics.compute_dice(*maps, include_background=False)
    metrics.compute_iou(*maps, include_background=False)
    metrics.compute_hausdorff_distance(*maps, percentile=95, spacing=SPACING)
    metrics.compute_average_surface_distance(*maps, symmetric=True, spacing=SPACING)


OURS = "this study: all 14 columns, mm and voxel"
METRICS = {
    OURS: ours,
    "MedPy: Dice, HD95": medpy_two,
    "MedPy: Dice, Jaccard, HD95, average distance": medpy_four,
    "MONAI: Dice, Jaccard, HD95, average distance": monai_four,
    "this study: overlap counts alone": ours_counts,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--acdc", type=Path, default=os.environ.get("LEVIT_STUDY_ACDC"))
    parser.add_argument("--volumes", type=int, default=10)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    references = list(volumes(arguments.acdc, arguments.volumes))
    for title, disturb in (("bent", bent), ("noise", noisy)):
        seconds = {name: [] for name in METRICS}
        for index, reference in enumerate([references[0], *references]):
            prediction = disturb(reference, random)
            for name, measure in METRICS.items():
                start = time.process_time()
                measure(prediction, reference)
                spent = time.process_time() - start
                if index: seconds[name].append(spent)  # the first round pays for imports
        print(f"{title} predictions, {len(references)} volumes, median per volume")
        median = {name: np.median(times) for name, times in seconds.items()}
        for name, value in median.items():
            print(f"  {1000 * value:8.1f} ms  {value / median[OURS]:6.2f} x  {name}")


if __name__ == "__main__": main()
