"""Agreement of the transformer with a wide head with recordings of RAE's code, whose time runs from data to noise."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from svgpipe.models.decoder_noise import scaled_noise, with_noise
from svgpipe.models.dit import DiT
from svgpipe.models.flow import flow_loss, shift_of, shift_time
from svgpipe.models.guidance import Guidance, GuidedVelocity
from svgpipe.models.sampler import SDE, _sample_ode, _sample_sde, sde_grid
from svgpipe.models.vit_decoder import ViTDecoder

from .conftest import Golden, GoldenFolder
from .test_golden import close, map_from_tokens, tokens_from_map

DDT = {"x_embedder.proj": "head.embed", "s_embedder.proj": "ln1", "s_projector": "head.project"}


def turned_time(weight: Tensor, frequencies: Tensor) -> Tensor:
    """Weights on sines and cosines of 2 pi (1 - t) W → on those of 2 pi t W."""
    of_sin, of_cos = weight.double().chunk(2, dim=1)
    angles = 2 * math.pi * frequencies.double()
    sin, cos = angles.sin(), angles.cos()
    return torch.cat([of_cos * sin - of_sin * cos, of_sin * sin + of_cos * cos], dim=1).float()


def renamed(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Weights under the names of `DiT`, for times from noise to data and velocities of that direction."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if "feat_rope" in key:
            continue
        name, sign = key, 1
        if (match := re.match(r"blocks\.(\d+)\.", key)) is not None and int(match[1]) >= depth:
            name = f"head.blocks.{int(match[1]) - depth}.{key[match.end() :]}"
        elif key.startswith("final_layer."):
            name, sign = f"head.{key}", -1 if ".linear." in key else 1
        elif (module := key.rpartition(".")[0]) in DDT:
            name = f"{DDT[module]}.{key.rpartition('.')[2]}"
        elif key == "t_embedder.mlp.0.weight":
            value = turned_time(value, state["t_embedder.W"])
        found[name] = sign * (value.flatten(1) if value.ndim == 4 else value)
    return found


def build(config: dict[str, Any], state: dict[str, Tensor]) -> DiT:
    width, depth, heads = (config[key] for key in ("hidden_size", "depth", "num_heads"))
    model = DiT(
        grid=(config["input_size"], config["input_size"]),
        in_channels=config["in_channels"],
        num_classes=config["num_classes"],
        width=width[0],
        depth=depth[0],
        heads=heads[0],
        mlp_ratio=config["mlp_ratio"],
        qk_norm=config["use_qknorm"],
        rms_norm=config["use_rmsnorm"],
        swiglu=config["use_swiglu"],
        rope=config["use_rope"],
        fourier_time=True,
        wide_head={"width": width[1], "depth": depth[1], "heads": heads[1]},
    )
    model.load_state_dict(renamed(state, depth[0]))
    return model.eval()


@pytest.fixture
def recording(golden: GoldenFolder) -> Golden:
    return golden.weights_of("rae")


@pytest.fixture
def model(recording: Golden) -> DiT:
    return build(recording.meta["config"]["stage2"], recording.group("sd."))


@pytest.fixture
def guide(recording: Golden) -> DiT:
    return build(recording.meta["config"]["guide"], recording.group("guide."))


def test_golden_rae_head(recording: Golden, model: DiT, guide: DiT) -> None:
    x, t, y = (recording[key] for key in "xty")
    for one, name in ((model, "out"), (guide, "guide_out")):
        with torch.no_grad():
            found = -map_from_tokens(one(tokens_from_map(x), 1 - t, y), one.grid)
        close(found, recording[name], recording.meta["suggested_atol"][name])


def test_golden_rae_training(recording: Golden, model: DiT) -> None:
    x1, y = tokens_from_map(recording["train.x1"]), recording["train.y"]
    for case in ("uniform", "lognormal"):
        noise, t = tokens_from_map(recording[f"train.{case}.x0"]), recording[f"train.{case}.t"]
        loss = flow_loss(model, x1, noise, 1 - t, y).per_sample
        close(loss, recording[f"train.{case}.loss"], recording.meta["suggested_atol"]["train.*.loss"])
    loss.mean().backward()
    frequencies = {"t_embedder.W": model.t_embedder.W}
    expected = renamed(recording.group("train.grad.") | frequencies, len(model.blocks))
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in expected.keys() - frequencies.keys():
        gradient = found[name]
        assert gradient is not None
        close(gradient, expected[name], 1e-4 * expected[name].abs().max().item())


def grid_of(case: dict[str, Any]) -> Tensor:
    """Times from noise (0) on; RAE stops before the data."""
    steps = torch.linspace(0, 0.999, case["args"]["num_steps"], dtype=torch.float64)
    return shift_time(steps, 1 / case["shift"]).float()


@pytest.mark.parametrize("name", ["ode_plain", "ode_cfg_interval", "ode_autoguidance", "ode_noshift"])
def test_golden_rae_sampling(recording: Golden, model: DiT, guide: DiT, name: str) -> None:
    case = recording.meta["cases"][name]
    grid = grid_of(case)
    times = torch.tensor(case["model_call_times"])
    close(1 - grid[:-1], times, 1e-6)
    if case["guidance"] == "cfg":
        low, high = case["interval"]
        guidance = Guidance(case["scale"], f"interval-{1 - high:.4f}-{1 - low:.4f}")
    elif case["guidance"] == "autoguidance":  # rounding puts RAE's first time outside of its interval of [0, 1]
        guidance = Guidance(case["scale"], "interval-0.01-1")
    else:
        guidance = Guidance()
    velocity = GuidedVelocity(model, model.null_label, guide if case["guidance"] == "autoguidance" else None)
    with torch.no_grad():
        z = _sample_ode(velocity, tokens_from_map(recording["z"]), recording["z_y"], guidance, grid, "euler")
    close(map_from_tokens(z, model.grid), recording[f"out.{name}"], case["suggested_atol"])


def test_golden_rae_sde(recording: Golden, model: DiT) -> None:
    """With a time shift, RAE's last step has a size and a time that do not fit the grid: the only difference."""
    case, name = recording.meta["cases"]["sde_sigma_mean"], "sde_sigma_mean"
    noise, size = recording[f"noise.{name}"], case["args"]["last_step_size"]
    grid = sde_grid(case["args"]["num_steps"], 1 / case["shift"], size)
    grid[-1] = grid[-2] + size
    start, labels = tokens_from_map(recording["z"]), recording["z_y"]
    with torch.no_grad():
        z = _sample_sde(
            GuidedVelocity(model, model.null_label),
            *(start, labels, Guidance(), grid),
            noise=lambda step: tokens_from_map(noise[step]),
            sde=SDE(last_step_size=size),
        )
    gap = (map_from_tokens(z, model.grid) - recording[f"out.{name}"]).abs().max().item()
    at_grid_end = recording.meta["wrong_detail_moves_out_by"][name]["last step evaluated where the grid ends"]
    assert gap == pytest.approx(at_grid_end, abs=case["suggested_atol"])


def test_golden_rae_shift_of_a_dimension(recording: Golden) -> None:
    u = recording["shift.u"]
    shift = shift_of("from-dimension", 16 * 16, 768)
    close(1 - shift_time(1 - u, shift), recording["shift.t_released"], 1e-6)
    assert shift_of("from-dimension", 16 * 16, 392) == pytest.approx(0.202, abs=5e-4)
    assert shift_of(0.4, 16 * 16, 768) == 0.4


PARTS = {
    "decoder_embed": "embed",
    "decoder_norm": "norm",
    "decoder_pred": "pred",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "decoder_layers": "blocks",
}


def decoder_state(official: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Weights of the official decoder under the names of `ViTDecoder`."""
    state = {key: value for key, value in official.items() if ".attention.attention." not in key}
    found = {"cls_token": state.pop("trainable_cls_token"), "pos_embed": state.pop("decoder_pos_embed")[:, 1:]}
    for key, value in state.items():
        for part, name in PARTS.items():
            key = key.replace(part, name)
        found[key] = value
    for number, kind in itertools.product(range(depth), ("weight", "bias")):
        at = f"decoder_layers.{number}.attention.attention"
        parts = [official[f"{at}.{name}.{kind}"] for name in ("query", "key", "value")]
        found[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
    return found


def test_golden_rae_decoder(recording: Golden) -> None:
    """Its sincos table is ours, but for the class token, whose position is zero."""
    sizes = recording.meta["config"]["decoder"]
    model = ViTDecoder(
        z_channels=sizes["hidden_size"],
        grid=sizes["grid"],
        patch=sizes["patch"],
        width=sizes["decoder_hidden_size"],
        depth=sizes["decoder_num_hidden_layers"],
        heads=sizes["decoder_num_attention_heads"],
        mlp_width=sizes["decoder_intermediate_size"],
    )
    table = model.pos_embed.clone()
    state = decoder_state(recording.group("dec."), len(model.blocks))
    close(table, state["pos_embed"], 1e-6)
    model.load_state_dict(state)
    mean, deviation = recording["stat.mean"], (recording["stat.var"] + recording.meta["config"]["eps"]).sqrt()
    with torch.no_grad():
        found = model.eval()(recording["decode.latent"] * deviation + mean)
    close((found + 1) / 2, recording["decode.image"], recording.meta["suggested_atol"]["decode"])


def test_golden_rae_noise_of_the_decoder_input(recording: Golden) -> None:
    config, name = recording.meta["config"], "encode.latent_train"
    mean, deviation = recording["stat.mean"], (recording["stat.var"] + config["eps"]).sqrt()
    tokens = recording["encode.latent"] * deviation + mean
    normal = map_from_tokens(recording["encode.noise"], (4, 4))
    noise = scaled_noise(recording["encode.noise_u"].flatten(), normal, config["noise_tau"])
    close((tokens + noise - mean) / deviation, recording[name], recording.meta["suggested_atol"]["encode"])


def test_noise_has_the_deviation_of_each_channel_over_all_processes() -> None:
    torch.manual_seed(0)
    latents = torch.randn(6, 3, 2, 2) * torch.tensor([0.1, 1.0, 10.0]).view(1, 3, 1, 1) + 5
    noise = torch.randn_like(latents)
    expected = latents + noise * latents.transpose(0, 1).flatten(1).std(dim=1).view(1, 3, 1, 1)
    torch.testing.assert_close(with_noise(latents, noise), expected)
    parts, sums = latents.split([2, 4]), iter(_sums(latents.split([2, 4])))
    torch.testing.assert_close(with_noise(parts[0], noise[:2], lambda _: next(sums)), expected[:2])


def _sums(parts: tuple[Tensor, ...]) -> list[Tensor]:
    """What two processes add up: count, sum and squared distances to the mean, per channel."""
    flat = torch.cat(parts).transpose(0, 1).flatten(1)
    return [torch.tensor(float(flat.shape[1])), flat.sum(1), (flat - flat.mean(1, keepdim=True)).square().sum(1)]
