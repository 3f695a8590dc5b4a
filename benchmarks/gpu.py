"""One call on a machine with a GPU: is training exact there, where does it wait, how fast is it?

    python benchmarks/gpu.py [--device cuda] [--seconds 540] [--small] [--output bench_gpu.json]

It needs torch, timm and the libraries that a training needs, neither DVC nor notebooks, and no
data: it trains on discs and squares on noise. Parts that matter most come first; each is written as
it ends, and none begins after `--seconds`. `--small` tries all of it in a minute, on a CPU too.

exact      a training repeated, and one stopped and resumed, as it is and with CUDA graphs; whether
           both give the same weights; kernels that are not reproducible
losses     each loss of params.yaml: value and gradient beside the CPU's
to_cpu     the weights on the CPU: share of equal labels; what resuming there says
waits      where a training step waits for the GPU, from `torch.cuda.set_sync_debug_mode`; one wait
           an epoch is meant, for its losses: a quarter a step here; see tests/test_waits.py
speed      images/s and memory of the whole step and of the bare one (forward, cross-entropy,
           backward, Adam), per network, batch and choice of kernels, and with CUDA graphs
profile    kernels and launches of a step
captured   images/s of the bare step, as it is, compiled, and in a CUDA graph
padded     ms of the decoder's odd shapes, as they are and rounded up to multiples of 8: a
           resize's product over 7 to 28 rows, the head's few classes
predict    slices/s of a volume
"""
import argparse
import copy
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from toy import toy_store

from levit_study.bench import bench_network, bench_step
from levit_study.data.dataset import PreparedStore, SliceSet
from levit_study.evaluation.inference import class_probabilities, load_network
from levit_study.files import StudyError
from levit_study.losses import build_loss
from levit_study.machine import describe_machine, timed
from levit_study.model import levit_unet
from levit_study.model.precision import autocast_precision, reproducible
from levit_study.params import Data, Model, Run, Training, load_params
from levit_study.training.fit import fit, train_epoch
from levit_study.training.record import Stopped
from levit_study.training.state import make_trainer
from levit_study.training.device import make_fabric
from levit_study.training.step import _aside, _record

PARAMS = Path(__file__).parents[1] / "params.yaml"


def toy_run(size, variant="128s", **training):
    "A run on the toy data"
    data = Data(folder="", structures={"disc": 1, "square": 2}, size=size)
    return Run(
        dataset="toy", loss="baseline", seed=0, data=data, model=Model(variant=variant),
        training=Training(**{"epochs": 2, "batch_size": 8, "learning_rate": 1e-3} | training),
        loss_settings={"kind": "baseline"},
    )


class Bench:
    "The parts of the benchmark; each returns what JSON holds"
    def __init__(self, args, folder):
        self.device, self.small, self.folder = args.device, args.small, Path(folder)
        self.size = 32 if args.small else 224
        self.store = self.folder / "toy.h5"
        toy_store(self.store, cases=6 if args.small else 12, slices=8, size=self.size)

    def fit(self, run, name, device=None, say=lambda line: None):
        place = self.folder / name
        return fit(run, self.store, place, place, device or self.device, say, progress=False)

    def exact(self):
        def stop(line):
            if "epoch 1/" in line: os.kill(os.getpid(), signal.SIGTERM)

        results = {}
        for graphs, name in ((False, ""), (True, "graphed_")):
            run = toy_run(self.size, ema=0.9, clip_norm=1.0, cuda_graph=graphs)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try: self.fit(run, f"{name}whole")
                except StudyError as error:
                    results[f"{name}error"] = str(error)
                    continue
            for turn in ("again", "stopped"):
                try: self.fit(run, name + turn, say=stop if turn == "stopped" else print)
                except Stopped: self.fit(run, name + turn)
            texts = {str(each.message)[:200] for each in caught}
            results |= {
                f"{name}repeated": self.same_weights(f"{name}whole", f"{name}again"),
                f"{name}resumed": self.same_weights(f"{name}whole", f"{name}stopped"),
                f"{name}not_deterministic": sorted(t for t in texts if "deterministic" in t),
            }
        if "graphed_error" not in results:
            results["graphed_same"] = self.same_weights("whole", "graphed_whole")
        return results

    def same_weights(self, a, b):
        from safetensors.torch import load_file
        left, right = (load_file(self.folder / name / "best.safetensors") for name in (a, b))
        return all(torch.equal(left[name], right[name]) for name in left)

    def losses(self):
        logits = torch.randn(4, 3, self.size, self.size)
        target = torch.randint(3, (4, self.size, self.size))
        rows = {}
        for name, settings in load_params(PARAMS).losses.items():
            settings = {key: value for key, value in settings.items() if key != "training"}
            rows[name] = [self.one_loss(settings, device, logits, target)
                          for device in ("cpu", self.device)]
        return rows

    def one_loss(self, settings, device, logits, target):
        "Value and norm of the gradient"
        criterion = build_loss(**settings).to(device)
        criterion.set_class_frequency(torch.tensor([0.8, 0.1, 0.1], device=device))
        logits = logits.to(device, copy=True).requires_grad_()
        loss = criterion(logits, target.to(device))
        loss.backward()
        dice = torch.tensor([0.9, 0.5, 0.2], device=device)
        criterion.update_from_training(dice)
        criterion.update_from_validation(dice)
        return loss.item(), logits.grad.norm().item()

    def to_cpu(self):
        image = np.random.default_rng(0).random((4, self.size, self.size), np.float32)
        weights, labels = self.folder / "whole/best.safetensors", []
        for device in (self.device, "cpu"):
            network = load_network(weights, device=device)
            parts = [p.argmax(1).cpu() for _, p in class_probabilities(network, image)]
            labels.append(torch.cat(parts))
        return {"equal_labels": (labels[0] == labels[1]).double().mean().item(),
                "resumed_on_cpu": self.resumed_on_cpu()}

    def resumed_on_cpu(self):
        "What a training that is half done says on the CPU; its checkpoints must stay"
        def stop(line):
            if "epoch 1/" in line: os.kill(os.getpid(), signal.SIGTERM)

        run, lines = toy_run(self.size), []
        try: self.fit(run, "half", say=stop)
        except Stopped: pass
        before = sorted((self.folder / "half").rglob("*.pt"))
        try: self.fit(run, "half", "cpu", lines.append)
        except StudyError as error: lines.append(str(error))
        kept = before == sorted((self.folder / "half").rglob("*.pt"))
        return {"kept": kept, "says": lines[-1].replace(str(self.folder), "…")}

    def trainer(self, variant="128s", batch=8, deterministic=True, steps=4, **more):
        "A trainer, and so many slices of the store that an epoch has so many steps"
        run = toy_run(self.size, variant, batch_size=batch, deterministic=deterministic, **more)
        store, fabric = PreparedStore(self.store), make_fabric(run.training, self.device)
        t = make_trainer(run, fabric, store.num_classes, store.voxel_shares("train"))
        held = store.load("train").to(fabric.device)
        chosen = np.resize(np.arange(len(held)), steps * batch)
        images, labels = held.images[chosen], held.labels[chosen]
        return t, SliceSet(store, held.indices[chosen], images, labels)

    def epoch(self, t, slices):
        t.step = 0
        train_epoch(t, slices, argparse.Namespace(step_done=lambda count: False), self.folder)
        t.epoch += 1

    def waits(self):
        t, slices = self.trainer(ema=0.9, clip_norm=1.0)
        self.epoch(t, slices)
        if self.device != "cuda": return {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try: self.epoch(t, slices)
            finally: torch.cuda.set_sync_debug_mode("default")
        places = [f"{Path(each.filename).name}:{each.lineno}" for each in caught
                  if "synchroniz" in str(each.message)]
        by_place = {place: places.count(place) / 4 for place in set(places)}
        most_first = sorted(by_place.items(), key=lambda item: -item[1])
        return {"a_step": len(places) / 4, "places": dict(most_first)}

    def speed(self):
        variants, batches = ("128s", "384"), (8, 32, 64, 128)
        if self.small: variants, batches = ("128s",), (4,)
        settings = itertools.product(variants, batches, (True, False))
        return [self.one_speed(*each) for each in settings]

    def one_speed(self, *about):
        variant, batch, deterministic = about
        row = {"variant": variant, "batch": batch, "deterministic": deterministic}
        try:
            if self.device == "cuda": torch.cuda.reset_peak_memory_stats()
            row["whole"] = self.rate_of_whole(*about)
            if self.device == "cuda": row["memory_mib"] = torch.cuda.max_memory_allocated() >> 20
            row["bare"] = self.rate(self.bare(variant, batch), batch)
            recorded = {"cuda_graph": True, "steps": 40}  # recorded anew in each epoch
            if batch <= 32: row["graphed"] = self.rate_of_whole(*about, **recorded)
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        except StudyError as error: row["note"] = str(error)
        if self.device == "cuda": torch.cuda.empty_cache()
        return row

    def rate_of_whole(self, *about, **more):
        "Images per second of the study's own steps"
        t, slices = self.trainer(*about, **more)
        self.epoch(t, slices)
        return len(slices) / timed(lambda: self.epoch(t, slices), self.device)

    def rate(self, step, batch):
        "Images per second of a step"
        return 4 * batch / timed(lambda: [step() for _ in range(4)], self.device)

    def bare(self, variant="128s", batch=8, mode=None):
        "A bare training step, already warm"
        model = levit_unet(variant, 3, image_size=self.size).to(self.device)
        images = torch.rand(batch, 1, self.size, self.size, device=self.device)
        network = bench_network(model, mode or autocast_precision(self.device), True)
        step = bench_step(*network, True, images)
        for _ in range(3): step()
        return step

    def profile(self):
        t, slices = self.trainer()
        self.epoch(t, slices)
        with torch.profiler.profile() as profiler: self.epoch(t, slices)
        events = profiler.key_averages()
        launches = sum(e.count for e in events if "LaunchKernel" in e.key) / 4
        times = {e.key[:80]: [e.count / 4, e.self_device_time_total / 4000] for e in events}
        longest = sorted(times.items(), key=lambda item: -item[1][1])[:25]
        return {"launches_a_step": launches, "count_and_ms_a_step": dict(longest)}

    def captured(self):
        modes = {"as it is": self.bare, "compiled": self.compiled, "graph": self.graph}
        batches, rows = (4,) if self.small else (8, 64), {}
        for (name, make), batch in itertools.product(modes.items(), batches):
            try: rows[f"{name}, {batch}"] = self.rate(make(batch=batch), batch)
            except Exception as error:
                rows[f"{name}, {batch}"] = f"{type(error).__name__}: {error}"[:300]
        return rows

    def compiled(self, batch): return self.bare(batch=batch, mode="compiled")

    def graph(self, batch):
        "A bare step as one CUDA graph: inputs that stay where they are, Adam that can be captured"
        reproducible(False)
        model = levit_unet("128s", 3, image_size=self.size).to(self.device)
        network, _ = bench_network(model, "bf16", True)
        images = torch.rand(batch, 1, self.size, self.size, device=self.device)
        target = torch.zeros(batch, self.size, self.size, dtype=torch.long, device=self.device)
        adam = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True, capturable=True)

        def step():
            adam.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                logits = network(images)
            F.cross_entropy(logits, target).backward()
            adam.step()

        for _ in range(3): _aside(step)
        return _record(step)

    def padded(self):
        "What tensor cores would gain from rounder shapes; bf16, batch 8"
        made = dict(device=self.device, dtype=torch.bfloat16)
        channels, rows = 64 if self.small else 256, {}

        def milliseconds(step):
            def ten(): return timed(lambda: [step() for _ in range(10)], self.device)
            return 100 * min(ten() for _ in range(5))

        for small in (7, 14, 28):
            wide = torch.rand(2 * small, -(-small // 8) * 8, **made)
            pixels = torch.rand(8, wide.shape[1], small * 3 * channels, **made)
            exact = wide[:, :small]
            matrices = {"as it is": exact.contiguous(), "aligned": exact, "rounded": wide}
            for name, matrix in matrices.items():
                inside = pixels[:, :matrix.shape[1]].contiguous()
                rows[f"product over {small}, {name}"] = milliseconds(
                    lambda a=matrix.expand(8, -1, -1), b=inside: torch.bmm(a, b))
        side = self.size // 4
        images = torch.rand(8, 144, side, side, **made).to(memory_format=torch.channels_last)
        for classes in (4, 8, 9, 16):
            head = torch.nn.Conv2d(144, classes, 3, padding=1, **made)
            head = head.to(memory_format=torch.channels_last)
            rows[f"head of {classes}"] = milliseconds(
                lambda head=head: head(images).sum().backward())
        return rows

    def predict(self):
        slices = 16 if self.small else 256
        image = np.random.default_rng(0).random((slices, self.size, self.size), np.float32)
        rows = {}
        for precision in ("fp32", "bf16"):
            weights = self.folder / "whole/best.safetensors"
            network = load_network(weights, device=self.device, precision=precision)
            for batch in (16, 64):
                def segment(network=network, batch=batch):
                    for _, p in class_probabilities(network, image, batch): p.argmax(1).cpu()
                segment()
                rows[f"{precision}, {batch}"] = slices / timed(segment, self.device)
        return rows


PARTS = "exact", "losses", "to_cpu", "waits", "speed", "profile", "captured", "padded", "predict"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", default="bench_gpu.json")
    args = parser.parse_args()
    results, started = {"machine": describe_machine(), "seconds": {}}, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        for part in args.parts:
            begin = time.perf_counter()
            if begin - started > args.seconds:
                results[part] = "no time left"
                continue
            try: results[part] = getattr(bench, part)()
            except Exception: results[part] = {"error": traceback.format_exc()[-2000:]}
            results["seconds"][part] = round(time.perf_counter() - begin, 1)
            Path(args.output).write_text(json.dumps(copy.copy(results), indent=1) + "\n")
            print(part, json.dumps(results[part])[:300], flush=True)


if __name__ == "__main__":
    main()
