"""Record what the public LeViT-UNet code computes; tests/test_model.py compares the model with it.

    python tests/record_parity.py FOLDER

FOLDER is a copy of the public code, https://github.com/apple1986/LeViT-UNet, which is not part of
this repository. For seeded weights and images, the public models' outputs must equal this study's
bit by bit in float32 on the machine that records; tests/parity.json then keeps a digest of each
output for machines like it (those of others stay), and some values of the public output in float64,
which every machine must reach: processors round float32 differently, and batch statistics of two
small maps amplify that to 3e-4 of the largest logit.
"""
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import platform
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import torch

from levit_study.model.build import levit_unet
from levit_study.model.pretrained import public_names, public_state

RECORD = Path(__file__).with_name("parity.json")
VARIANTS = ("128s", "192", "384")
CASES = [(variant, 224, training) for variant in VARIANTS for training in (False, True)]
CASES.append(("128s", 256, False))


def seeded(name, shape):
    "Uniform numbers in [-1, 1) that depend on the name alone: RandomState's stream is frozen"
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(random.random_sample(tuple(shape)).astype("float32") * 2 - 1)


def seeded_value(name, tensor):
    "Values like a trained model's: norms near 1, weights scaled by their number of inputs"
    if name.endswith("num_batches_tracked"):
        return tensor
    noise = seeded(name, tensor.shape)
    if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
        return 1 + noise / 2
    if tensor.ndim == 1:
        return noise / 5
    return noise if "attention_biases" in name else noise / tensor[0].numel() ** 0.5


def seeded_model(variant, size):
    "This study's model with seeded weights and no dropped residuals"
    model = levit_unet(variant, 9, image_size=size, drop_path=0.0)
    state = model.state_dict()
    model.load_state_dict({name: seeded_value(name, tensor) for name, tensor in state.items()})
    return model


def output(model, size, training, dtype=torch.float32):
    "Logits of one seeded image, or of two in training mode (batch statistics)"
    torch.set_num_threads(1)  # sums in one order
    images = seeded("images", (1 + training, 1, size, size)).to(dtype)
    with torch.no_grad():
        return model.to(dtype).train(training)(images)


def digest(logits):
    "SHA-256 of all values in float32"
    return hashlib.sha256(logits.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def sample(logits):
    "64 of the values"
    flat = logits.contiguous().flatten()
    return [float(v) for v in flat[:: len(flat) // 64][:64]]


def rounding():
    "Name what decides how float sums are rounded: torch's build and the processor's instructions"
    flags = platform.processor()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith("flags")), lines[0])
    instructions = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()
    return f"torch {torch.__version__}, instructions {instructions[:16]}"


def stand_in(name, **names):
    "A module that the public code imports without using it"
    sys.modules.setdefault(name, types.ModuleType(name)).__dict__.update(names)


def public_model(folder, variant, size):
    "Build the public model for that image size, without its messages and without dropped residuals"
    for name in ("cv2", "utils"):
        stand_in(name)
    stand_in("ptflops", get_model_complexity_info=None)
    stand_in("timm.models.layers", activations=None)
    stand_in("timm.models.registry", register_model=lambda function: function)
    path = Path(folder) / f"LeViT-UNet-{variant}.py"
    spec = importlib.util.spec_from_file_location("public" + variant, path)
    module = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(io.StringIO()):
        spec.loader.exec_module(module)
        model_class = getattr(module, f"LeViT_UNet_{variant}")
        sized = functools.partial(model_class, img_size=size)
        setattr(module, f"LeViT_UNet_{variant}", sized)
        model = getattr(module, f"Build_LeViT_UNet_{variant}")(num_classes=9)
    for part in model.modules():
        if isinstance(part, module.Residual):
            part.drop = 0
    return model


def parameters(model):
    "Number of parameters"
    return sum(p.numel() for p in model.parameters())


def record_case(folder, case, digests):
    "Compare the two models on one case, and return what is recorded of it"
    variant, size, training = case
    model, public = seeded_model(variant, size), public_model(folder, variant, size)
    assert parameters(model) == parameters(public)
    public.load_state_dict(public_state(model))
    expected = output(public, size, training)
    same = torch.equal(output(model, size, training), expected)
    assert same, f"{variant} at {size}, training {training}: not the public code's output"
    double = output(public, size, training, torch.float64)
    print(variant, size, "training" if training else "inference", "equal to the last bit")
    return dict(
        variant=variant, size=size, training=training, shape=list(expected.shape),
        largest=float(double.abs().max()),
        sha256=digests.get(case, {}) | {rounding(): digest(expected)},
        float64=sample(double),
    )


def names_digest(variant):
    "Checksum of the public names of a variant's tensors"
    names = public_names(levit_unet(variant, 9)).values()
    return zlib.crc32(" ".join(sorted(names)).encode())


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    known = json.loads(RECORD.read_text())["records"] if RECORD.exists() else []
    digests = {(r["variant"], r["size"], r["training"]): r["sha256"] for r in known}
    records = [record_case(sys.argv[1], case, digests) for case in CASES]
    names = {variant: names_digest(variant) for variant in VARIANTS}
    RECORD.write_text(json.dumps(dict(names=names, records=records), indent=1) + "\n")


if __name__ == "__main__":
    main()
