"""Properties that every loss must have: finite on any batch, exact derivatives, the same for any order and layout of the pixels."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from levit_study.bench import bench_losses, monai_counterparts
from levit_study.files import StudyError
from levit_study.losses import build_loss
from levit_study.losses.comparison import LabelCheck
from levit_study.losses.interface import LOSSES
from levit_study.params import load_params
from levit_study.settings import check_loss

CASES = {kind: {} for kind in LOSSES} | {
    "hybrid": {"terms": [{"kind": "focal_tversky", "weight": .5}, {"kind": "cross_entropy", "weight": .5}, {"kind": "lovasz_softmax", "weight": .1}]},
    "frequency_weighted": {"of": {"kind": "baseline"}},
    "dice_weighted": {"of": {"kind": "focal_tversky"}},
    "uncertainty_weighted": {"terms": [{"kind": "cross_entropy"}, {"kind": "dice"}]},
    "uncertainty_weighted per class": {"terms": [{"kind": "focal"}, {"kind": "dice_focal"}], "per": "class"},
    "focal, gamma 0.5": {"gamma": .5, "alpha": 1},
    "focal_tversky, gamma 3 per image": {"gamma": 3, "per_image": True},
    "focal_tversky, gamma 0.5 sum": {"gamma": .5, "class_reduction": "sum"},
    "dice, foreground of present classes": {"include_background": False, "skip_absent": True, "squared": False},
    "generalised_dice, foreground per image": {"include_background": False, "per_image": True},
    "unified_focal symmetric": {"asymmetric": False},
    "lovasz_softmax, per image": {"per_image": True},
    "tvmf_dice, kappa 30": {"start": 30},
    "topk, half": {"share": .5},
    "boundary, all classes per image": {"include_background": True, "per_image": True, "step": .5},
    "hybrid, Dice and top-k": {"terms": [{"kind": "dice", "weight": .5}, {"kind": "topk", "weight": .5}]},
    "hybrid, Dice and boundary": {"terms": [{"kind": "generalised_dice"}, {"kind": "boundary", "start": .01, "step": .01}]},
    "frequency_weighted, top-k": {"of": {"kind": "topk"}},
}
KINDS = sorted(CASES)


def made(case, num_classes=None, **more):
    "The loss of a case, as it is after an epoch of training if the number of classes is given"
    criterion = build_loss(case.split(",")[0].split(" ")[0], **CASES[case], **more)
    if num_classes:
        criterion.set_class_frequency(torch.linspace(num_classes, 1, num_classes) / sum(range(num_classes + 1)))
        for hook in (criterion.update_from_training, criterion.update_from_validation): hook(torch.linspace(.9, .2, num_classes))
    return criterion


def with_gradient(criterion, logits, target):
    logits = logits.detach().requires_grad_()
    value = criterion(logits, target)
    return value, torch.autograd.grad(value, logits)[0]


LABELS = {
    "any": lambda shape, classes: torch.randint(classes, shape),
    "absent class": lambda shape, classes: torch.randint(classes - 1, shape),
    "one class": lambda shape, classes: torch.full(shape, classes - 1),
    "all background": lambda shape, classes: torch.zeros(shape, dtype=torch.long),
    "single pixel": lambda shape, classes: torch.zeros(shape, dtype=torch.long).index_put_((torch.tensor(0),) * 3, torch.tensor(1)),
    "perfectly predicted": lambda shape, classes: None,
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(case=st.sampled_from(KINDS), seed=st.integers(0, 999), batch=st.integers(1, 2), classes=st.integers(2, 5), height=st.integers(1, 6),
       width=st.integers(1, 6), size=st.sampled_from([0., 1., 30., 1e4]), precision=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
       labels=st.sampled_from(sorted(LABELS)), layout=st.sampled_from(sorted(LAYOUTS)), integer=st.sampled_from([torch.uint8, torch.int16, torch.int64]),
       ignore=st.booleans(), adapted=st.booleans())
def test_finite_on_any_batch(case, seed, batch, classes, height, width, size, precision, labels, layout, integer, ignore, adapted):
    torch.manual_seed(seed)
    logits = LAYOUTS[layout]((size * torch.randn(batch, classes, height, width)).clamp(-1e4, 1e4).to(precision))
    target = LABELS[labels]((batch, height, width), classes)
    if target is None: target = logits.argmax(1)
    if ignore: target = target.masked_fill(torch.rand(target.shape) < .4, 255)
    if ignore and integer == torch.int16: target.fill_(255)  # nothing left to learn from
    value, gradient = with_gradient(made(case, classes if adapted else None, ignore_index=255 if ignore else None), logits, target.to(integer))
    assert value.dtype == torch.float32 and value.ndim == 0 and value.isfinite()
    assert gradient.isfinite().all() and gradient.shape == logits.shape and gradient.dtype == precision


@pytest.mark.parametrize("case", KINDS)
def test_derivative(case):
    torch.manual_seed(0)
    logits, target = 2 * torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randint(4, (2, 3, 5))
    target[0, 0, 0] = 255
    criterion = made(case, 4, ignore_index=255)
    assert torch.autograd.gradcheck(lambda x: criterion(x, target), logits.requires_grad_())


@pytest.mark.parametrize("case", KINDS)
def test_order_layout_and_integer_type_do_not_matter(case):
    torch.manual_seed(1)
    logits, target = torch.randn(2, 4, 6, 8), torch.randint(4, (2, 6, 8))
    criterion = made(case, 4)
    value, gradient = with_gradient(criterion, logits, target)
    for layout in LAYOUTS.values():
        for integer in (torch.uint8, torch.int32):
            again, its_gradient = with_gradient(criterion, layout(logits), target.to(integer))
            torch.testing.assert_close(again, value)
            torch.testing.assert_close(its_gradient, gradient)
    order = torch.randperm(48)
    if "boundary" not in case:   # the only one that asks where a pixel lies
        again, its_gradient = with_gradient(criterion, logits.flatten(2)[..., order].view(2, 4, 6, 8), target.flatten(1)[:, order].view(2, 6, 8))
        torch.testing.assert_close(again, value)
        torch.testing.assert_close(its_gradient, gradient.flatten(2)[..., order].view(2, 4, 6, 8))
    again, _ = with_gradient(criterion, logits.flip(0), target.flip(0))
    torch.testing.assert_close(again, value)


# The background is a class of its own for the Unified Focal loss and where it is left out; a weighted loss is symmetric if its weights move along.
@pytest.mark.parametrize("case", [case for case in KINDS if not case.startswith(("modified", "unified")) and "foreground" not in case
                                  and "boundary" not in case.removesuffix(", all classes per image")])
def test_names_of_classes_do_not_matter(case):
    torch.manual_seed(2)
    logits, target, order = torch.randn(2, 4, 6, 8), torch.randint(4, (2, 6, 8)), torch.randperm(4)
    value, gradient = with_gradient(made(case), logits, target)
    renamed, its_gradient = with_gradient(made(case), logits[:, order], order.argsort()[target])
    torch.testing.assert_close(renamed, value)
    torch.testing.assert_close(its_gradient, gradient[:, order])


@pytest.mark.parametrize("case", KINDS)
def test_ignored_pixels_are_as_if_cut_off(case):
    torch.manual_seed(3)
    logits, target = torch.randn(2, 4, 6, 8), torch.randint(4, (2, 6, 8))
    value, gradient = with_gradient(made(case, 4), logits[..., :5], target[..., :5])
    target[..., 5:] = -100
    ignoring, its_gradient = with_gradient(made(case, 4, ignore_index=-100), logits, target)
    torch.testing.assert_close(ignoring, value)
    torch.testing.assert_close(its_gradient[..., :5], gradient)
    assert (its_gradient[..., 5:] == 0).all()


@pytest.mark.parametrize("case", KINDS)
def test_learnt_state_is_resumed(case):
    torch.manual_seed(4)
    logits, target = torch.randn(2, 4, 6, 8), torch.randint(4, (2, 6, 8))
    criterion, resumed = made(case, 4), made(case)
    with torch.no_grad():
        for parameter in criterion.parameters(): parameter.add_(torch.randn_like(parameter))
    resumed.set_class_frequency(torch.full((4,), .25))
    resumed.load_state_dict(criterion.state_dict())
    assert resumed(logits, target).item() == criterion(logits, target).item()


@pytest.mark.parametrize("case", KINDS)
def test_mixed_precision_is_switched_off_inside(case):
    torch.manual_seed(5)
    logits, target = torch.randn(2, 4, 6, 8).bfloat16(), torch.randint(4, (2, 6, 8))
    criterion = made(case, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16): value = criterion(logits, target)
    assert value.item() == criterion(logits.float(), target).item()


# Boundary loss alone says nothing of a structure that an image lacks; in a sum with a region term it does not have to.
@pytest.mark.parametrize("case", [case for case in KINDS if case != "boundary"])
def test_its_minimum_is_the_truth(case):
    "Free logits descend to the right labels, a single pixel included"
    torch.manual_seed(10)
    target = torch.zeros(2, 16, 16, dtype=torch.long)
    target[:, 2:9, 2:9], target[0, 12:14, 12:14], target[1, 11, 5] = 1, 2, 3
    criterion, logits = made(case, 4), torch.nn.Parameter(.5 * torch.randn(2, 4, 16, 16))
    optimiser = torch.optim.Adam([logits], lr=.2)
    for _ in range(120):
        optimiser.zero_grad()
        criterion(logits, target).backward()
        optimiser.step()
    assert (logits.argmax(1) == target).all()


@pytest.mark.parametrize("kind", ["cross_entropy", "baseline", "focal", "focal_tversky", "dice", "tversky", "dice_focal", "generalised_dice"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_agrees_with_monai(kind, precision):
    torch.manual_seed(6)
    logits, target = torch.randn(2, 5, 24, 24, dtype=precision), torch.randint(5, (2, 24, 24))
    own_settings, theirs = monai_counterparts(5)[kind]
    value, gradient = with_gradient(build_loss(kind, **own_settings), logits, target)
    expected, its_gradient = with_gradient(theirs, logits, target[:, None])
    torch.testing.assert_close(value, expected.to(precision), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, its_gradient, rtol=1e-4, atol=1e-5 * its_gradient.abs().max().item())


def test_unified_focal_agrees_with_monai_on_two_classes():
    "MONAI's form is for one structure, takes probabilities, and divides the pixel part by the two classes"
    from monai.losses.unified_focal_loss import AsymmetricFocalLoss, AsymmetricFocalTverskyLoss
    torch.manual_seed(7)
    logits, target = torch.randn(3, 2, 16, 16, dtype=torch.float64), torch.randint(2, (3, 16, 16))
    settings = {"delta": .7, "gamma": .4}
    pixels, regions = (theirs(to_onehot_y=True, **settings)(logits.softmax(1), target[:, None]) for theirs in (AsymmetricFocalLoss, AsymmetricFocalTverskyLoss))
    torch.testing.assert_close(build_loss("modified_focal", **settings)(logits, target), 2 * pixels, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(build_loss("modified_focal_tversky", **settings)(logits, target), regions, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(build_loss("unified_focal", focal_weight=.3, **settings)(logits, target), .3 * 2 * pixels + .7 * regions, rtol=1e-5, atol=1e-6)


PARAMS = Path(__file__).with_name("params.yaml")


def test_every_loss_of_params_yaml_is_one():
    torch.manual_seed(9)
    for name, entry in load_params(PARAMS).losses.items():
        assert build_loss(**entry)(torch.randn(1, 4, 6, 8), torch.randint(4, (1, 6, 8))).isfinite(), name


def test_losses_of_params_yaml_are_checked_without_torch():
    code = f"""
import sys
from ruamel.yaml import YAML
from levit_study.settings import check_loss
losses = YAML(typ="safe").load(open({str(PARAMS)!r}))["losses"]
for name, entry in losses.items(): check_loss(entry, name)
print(len(losses), "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, torch_was_imported = result.stdout.split()
    assert int(number) >= 3 and torch_was_imported == "False"


@pytest.mark.parametrize("case", KINDS)
def test_what_the_check_fills_in_is_what_the_loss_has(case):
    torch.manual_seed(11)
    logits, target, kind = torch.randn(2, 4, 6, 8), torch.randint(4, (2, 6, 8)), case.split(",")[0].split(" ")[0]
    entry = check_loss({"kind": kind, **CASES[case], "training": {"epochs": 3}}, "losses.mine")
    assert set(CASES[case]) | {"kind", "ignore_index"} <= set(entry)
    assert build_loss(**entry)(logits, target).item() == build_loss(kind, **CASES[case])(logits, target).item()


MODULES = {
    "fine": """
from levit_study.losses import PixelLoss, number

class Mine(PixelLoss):
    def __init__(self, q:number(0, 1)=0.5, **settings):
        super().__init__(**settings)
        self.q = q

    def pixel_values(self, comparison): return -self.q * comparison.log_true
""",
    "broken": "def",
    "failing": "1 / 0",
    "puzzling": """
import torch

class Mine(torch.nn.Module):
    def __init__(self, q:"no_such_type"=1): super().__init__()
"""}


@pytest.mark.parametrize("module, settings, message", [
    ("fine", {"q": 2}, "loss 'fine.Mine': setting 'q' is 2, but must be a number from 0 to 1"),
    ("fine", {"p": 2}, "loss 'fine.Mine': 'p' is not a setting of this loss; it has q, ignore_index"),
    ("fine", {"ignore_index": "air"}, "loss 'fine.Mine': setting 'ignore_index' is 'air'"),
    ("broken", {}, "kind 'broken.Mine' cannot be imported: SyntaxError"),
    ("failing", {}, "kind 'failing.Mine' cannot be imported: ZeroDivisionError: division by zero"),
    ("puzzling", {}, "loss 'Mine': the arguments of its __init__ cannot be read: name 'no_such_type' is not defined"),
    ("missing", {}, "kind 'missing.Mine' cannot be imported: ModuleNotFoundError")])
def test_a_class_of_the_users_is_checked_by_its_signature(module, settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    where = "params.yaml: losses.mine"
    with pytest.raises(StudyError) as error: check_loss({"kind": f"{module}.Mine", **settings}, where)
    assert str(error.value).startswith(f"{where}: ") and message in str(error.value) and "\n" not in str(error.value)
    if module == "fine":
        logits, target = torch.randn(1, 3, 4, 4), torch.randint(3, (1, 4, 4))
        entry = check_loss({"kind": "fine.Mine", "q": 1}, where)
        assert build_loss(**entry)(logits, target).item() == build_loss("cross_entropy")(logits, target).item()


def test_per_image_is_the_mean_of_single_images():
    torch.manual_seed(8)
    logits, target = torch.randn(3, 4, 6, 8), torch.randint(4, (3, 6, 8))
    for kind in ("dice", "tversky", "focal_tversky", "generalised_dice", "unified_focal", "tvmf_dice"):
        criterion = build_loss(kind, per_image=True)
        torch.testing.assert_close(criterion(logits, target), torch.stack([criterion(logits[i:i + 1], target[i:i + 1]) for i in range(3)]).mean())


def test_large_equal_sums_do_not_drift():
    logits, target = torch.zeros(8, 2, 512, 512), torch.zeros(8, 512, 512, dtype=torch.long)
    logits[:, 0] = torch.tensor(.998 / .002).log()
    for kind in ("dice", "focal_tversky", "baseline"):
        single, double = build_loss(kind)(logits, target), build_loss(kind)(logits.double(), target)
        assert abs(single.item() / double.item() - 1) < 1e-5, kind


def test_a_label_out_of_range_is_found_without_waiting_for_a_gpu(monkeypatch):
    class Event:
        arrived = False
        def record(self): pass
        def query(self): return Event.arrived
    monkeypatch.setattr(LabelCheck, "on_gpu", staticmethod(lambda labels: True))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    criterion, logits, target, wrong = build_loss("baseline"), torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), torch.full((1, 4, 4), 3)
    with pytest.raises(StudyError, match="labels run from 3 to 3, but the logits have 3 classes"): build_loss("baseline")(logits, wrong)
    criterion(logits, target)
    assert criterion(logits, wrong).isfinite()  # clamped, and on its way
    assert criterion(logits, target).isfinite()
    Event.arrived = True
    criterion(logits, target)  # judges the first batch's copy, and sends the next
    with pytest.raises(StudyError, match="labels run from 0 to 3"): criterion(logits, target)
    with pytest.raises(StudyError, match="labels run from 0 to 3"): criterion.update_from_training(torch.ones(3))


@pytest.mark.parametrize("target", [torch.full((1, 4, 4), 3), torch.full((1, 4, 4), -1), torch.full((1, 4, 4), 255, dtype=torch.uint8)])
def test_a_label_out_of_range_is_one_clear_line(target):
    with pytest.raises(StudyError, match="target: labels run from .* but the logits have 3 classes") as error:
        build_loss("focal")(torch.randn(1, 3, 4, 4), target)
    assert "\n" not in str(error.value)


def test_needs_no_more_memory_than_monai():
    "Their time is a matter of `benchmarks/losses.py`, as it depends on the machine"
    table = bench_losses(shapes=[(8, 9, 224, 224)], repeats=1, kinds=["baseline", "focal", "focal_tversky"])
    assert (table.mebibytes < table.monai_mebibytes).all(), table.to_string()
