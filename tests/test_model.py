"""What is too slow or too particular for the model's notebooks.

Parity with the public code, weight files of all forms, odd sizes.
"""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from record_parity import RECORD, digest, names_digest, output, rounding, sample, seeded_model

from levit_study.bench import bench_model, write_bench
from levit_study.files import StudyError
from levit_study.model.build import for_training, levit_unet
from levit_study.model.grids import resize_attention
from levit_study.model.inference import for_inference, load_weights
from levit_study.model.network import VARIANTS
from levit_study.model.pretrained import load_pretrained, public_state
from levit_study.model.weights import read_card, save_weights

PARITY = json.loads(RECORD.read_text())


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def case_of(record):
    return f"{record['variant']}-{record['size']}-{'train' if record['training'] else 'infer'}"


@pytest.mark.parametrize("record", PARITY["records"], ids=case_of)
def test_outputs_are_those_of_the_public_code(record):
    variant, size, training = (record[key] for key in ("variant", "size", "training"))
    logits = output(seeded_model(variant, size), size, training)
    assert list(logits.shape) == record["shape"]
    if rounding() in record["sha256"]:  # to the last bit
        assert digest(logits) == record["sha256"][rounding()]
    exact = output(seeded_model(variant, size), size, training, torch.float64)
    # The logits end in float32: the last resize is exact to 224 * 2^-24 = 1.3e-5 of a pixel.
    tolerance = 1e-5 * record["largest"]
    np.testing.assert_allclose(sample(exact), record["float64"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_public_names_are_pinned(variant):
    assert names_digest(variant) == PARITY["names"][variant]


def assert_same_weights(model, other):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_public_weights_come_whole(variant, tmp_path):
    "With the 192's duplicate blocks, and wrapped as data-parallel training leaves them"
    model = seeded_model(variant, 224)
    wrapped = {f"module.{name}": tensor for name, tensor in public_state(model).items()}
    torch.save({"state_dict": wrapped}, tmp_path / "public.pth")
    loaded = levit_unet(variant, 9, pretrained=tmp_path / "public.pth")
    assert loaded.load_report.initial == []
    assert len(loaded.load_report.loaded) == len(model.state_dict())
    assert_same_weights(model, loaded)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_encoder_tensor_comes_from_imagenet_weights(variant, tmp_path, monkeypatch):
    "Through timm's hub names, from the cache, without a network"
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    donor = timm.create_model(f"levit_{variant}", pretrained=False)
    for name, p in donor.named_parameters():
        if "attention_biases" in name:
            torch.nn.init.normal_(p)
    folder = tmp_path / "hub" / f"models--timm--levit_{variant}.fb_dist_in1k"
    snapshot = folder / "snapshots" / ("0" * 40)
    (folder / "refs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (folder / "refs" / "main").write_text(snapshot.name)
    save_file(donor.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = levit_unet(variant, 4, pretrained=True)
    encoder = [name for name in model.state_dict() if name.startswith(("stem.", "stages."))]
    assert model.load_report.loaded == encoder
    assert {name.split(".")[0] for name in model.load_report.skipped} == {"head", "head_dist"}
    given, loaded = donor.state_dict(), model.state_dict()
    first = "stem.conv1.linear.weight"
    assert torch.equal(loaded[first], given[first].sum(1, keepdim=True))
    for name in encoder[1:]:
        assert torch.equal(loaded[name], given[name]), name


def test_unreachable_hub_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = "timm/levit_128s.fb_dist_in1k .* model.safetensors .*pretrained"
    with pytest.raises(StudyError, match=message) as error:
        levit_unet("128s", 4, pretrained=True)
    assert "\n" not in str(error.value)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    height=st.integers(1, 5), width=st.integers(1, 5),
    channels=st.integers(1, 3), batch=st.integers(1, 3))
def test_any_multiple_of_32_in_both_orders(height, width, channels, batch):
    torch.manual_seed(0)
    model = levit_unet("128s", 3, in_channels=channels).eval()
    images = torch.randn(batch, channels, 32 * height, 32 * width)
    with torch.no_grad():
        published, cheaper = model(images), for_inference(model, "fp32")(images)
    assert published.shape == (batch, 3, 32 * height, 32 * width)
    assert (published - cheaper).abs().max() <= 1e-4 * published.abs().max()


def test_training_in_the_cheaper_order_has_the_same_gradients():
    "In float64, where rounding hides nothing"
    torch.manual_seed(0)
    images = torch.randn(2, 1, 96, 64, dtype=torch.float64)
    gradients, losses = [], []
    exact = levit_unet("128s", 3, image_size=(96, 64)).double()
    faster = levit_unet("128s", 3, image_size=(96, 64)).double()
    faster.load_state_dict(exact.state_dict())
    for model in (exact, for_training(faster)):
        loss = model.train()(images).square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # the logits are float32
    scale = max(g.abs().max() for g in gradients[0])
    for a, b in zip(*gradients):
        assert (a - b).abs().max() < 1e-5 * scale


def test_gradients_reach_the_biases_of_another_grid():
    model = seeded_model("128s", 224)
    model(torch.randn(2, 1, 64, 96)).square().mean().backward()
    for block in model.stages[0].blocks:
        assert block.attn.attention_biases.grad.abs().sum() > 0


def test_weights_survive_training_layout_and_resizing(tmp_path):
    model = resize_attention(for_training(seeded_model("128s", 224)), (160, 96)).eval()
    save_weights(tmp_path / "w.safetensors", model, intensity={"window": [0, 1]})
    again, card = load_weights(tmp_path / "w.safetensors")
    images = torch.randn(1, 1, 160, 96)
    model.exact = True
    with torch.no_grad():
        assert torch.allclose(model(images), again(images), atol=1e-5)
    assert card["intensity"] == {"window": [0, 1]}
    assert card["image_size"] == [160, 96]
    with pytest.raises(StudyError, match="norms are folded"):
        save_weights(tmp_path / "folded.safetensors", for_inference(model))


def rewrite(source, target, **changes):
    "Copy a weight file with other entries on its card"
    from safetensors.torch import load_file, save_file

    card = read_card(source) | changes
    save_file(load_file(source), target, metadata={"card": json.dumps(card)})


@pytest.mark.parametrize("changes, message", [
    (dict(variant="512"), "variant '512' is unknown"),
    (dict(variant="192"), "do not fit"),
    (dict(num_classes=5), "do not fit"),
    (dict(num_classes=None), "out of range"),
    (dict(image_size=[1 << 20, 1 << 20]), "out of range"),
    (dict(image_size="224"), "out of range"),
    (dict(image_size=224), "out of range"),
    (dict(num_classes="4"), "out of range"),
    (dict(variant=["128s"]), "out of range"),
    (dict(encoders="2"), "out of range"),
    (dict(encoders=3), "out of range"),
    (dict(channels=5), "out of range"),
    (dict(network="unet", settings={"widths": [200_000, 200_000, 200_000]}), "out of range"),
    (dict(image_size=[100, 100]), "multiples of 32"),
])
def test_a_card_that_does_not_fit_is_refused_in_one_line(changes, message, tmp_path):
    save_weights(tmp_path / "good.safetensors", levit_unet("128s", 4))
    rewrite(tmp_path / "good.safetensors", tmp_path / "bad.safetensors", **changes)
    with pytest.raises(StudyError, match=message) as error:
        load_weights(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


def test_weights_of_this_study_start_another_one(tmp_path):
    "Transfer to other classes with a new head"
    source = seeded_model("128s", 224)
    save_weights(tmp_path / "w.safetensors", source)
    model = levit_unet("128s", 4)
    report = load_pretrained(model, tmp_path / "w.safetensors", new_head=True)
    assert report.initial == ["head.weight", "head.bias"]
    assert torch.equal(model.decoder[2].conv2[0].weight, source.decoder[2].conv2[0].weight)


@pytest.mark.parametrize("name, shape, message", [
    ("head.weight", (), r"first head.weight: \(\) instead of"),
    ("stages.0.blocks.0.attn.attention_biases", (4, 0), r"attention_biases: \(4, 0\) instead of"),
    ("stages.0.blocks.0.attn.attention_biases", (25,), r"attention_biases: \(25,\) instead of"),
    ("stages.0.blocks.0.attn.attention_biases", (), r"attention_biases: \(\) instead of"),
    ("stem.conv1.linear.weight", (16, 0, 3, 3), r"weight: \(16, 0, 3, 3\) instead of"),
])
def test_a_tensor_of_an_odd_shape_is_named(name, shape, message, tmp_path):
    model = levit_unet("128s", 4)
    torch.save(model.state_dict() | {name: torch.zeros(shape)}, tmp_path / "odd.pth")
    with pytest.raises(StudyError, match=message) as error: load_pretrained(model, tmp_path / "odd.pth")
    assert "\n" not in str(error.value)


def test_inference_in_bf16_agrees_with_float32():
    model, images = seeded_model("128s", 64).eval(), torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        exact, half = model(images), for_inference(model, "bf16")(images)
    assert half.dtype == torch.float32
    assert (half - exact).abs().mean() < 0.02 * exact.abs().max()


def test_validation_in_inference_mode_does_not_spoil_training():
    model = for_training(levit_unet("128s", 3, image_size=64))
    images = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        model.eval()(images)
    model.train()(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_loading_weights_takes_effect_in_evaluation_mode():
    "timm keeps indexed attention biases in evaluation mode; they must not outlive the weights"
    model, other = seeded_model("128s", 224).eval(), levit_unet("128s", 9).eval()
    images = torch.randn(1, 1, 224, 224)
    with torch.no_grad():
        before = model(images)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(images), other(images))
        assert not torch.equal(model(images), before)


def test_onnx_computes_the_same(tmp_path):
    import onnx

    from levit_study.model.export import export_onnx

    path = tmp_path / "model.onnx"
    assert export_onnx(seeded_model("128s", 64).eval(), path, dataset="phantom_ct") < 1e-4
    assert {p.key for p in onnx.load(path).metadata_props} >= {"variant", "dataset", "image_size"}


def test_bench_writes_a_table_with_its_machine(tmp_path):
    table = bench_model(["128s"], batch=2, image_size=32, repeats=1, progress=lambda line: None)
    write_bench(table, tmp_path / "bench.csv", batch=2, image_size=32)
    table = pd.read_csv(tmp_path / "bench.csv")
    assert list(table["mode"]) == ["fp32 eager", "fp32", "bf16"] * 2
    assert table.note.isna().all()
    assert {"device", "torch", "threads", "memory_mib", "batch", "image_size"} <= set(table)
