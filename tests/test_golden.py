"""Agreement with recordings of the official code, with the tolerance of each recording.

All configurations are read from the JSON files, so SVGPIPE_GOLDEN may point at other recordings.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from svgpipe.models import convert
from svgpipe.models.backbone import Backbone
from svgpipe.models.ddpm import Process, ddim_steps, ddpm_loss, equal_steps, noised, sample_ddpm
from svgpipe.models.decoder import Decoder
from svgpipe.models.dit import DiT, time_features
from svgpipe.models.dopri5 import integrate
from svgpipe.models.encoder import Encoder
from svgpipe.models.flow import drop_labels, flow_loss, logit_normal, shift_time
from svgpipe.models.guidance import Guidance, GuidedVelocity
from svgpipe.models.kl_autoencoder import KLAutoencoder, Posterior
from svgpipe.models.losses import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from svgpipe.models.official import dit_sizes
from svgpipe.models.official_vae import kl_from_official
from svgpipe.models.representation_alignment import MLPProjector, representation_loss
from svgpipe.models.residual import Alignment, ResidualEncoder
from svgpipe.models.sampler import SDE, Solver, sample, time_grid
from svgpipe.models.svg_autoencoder import SVGAutoencoder
from svgpipe.models.vision_loss import distance_matrix_loss, marginal_cosine_loss, vision_loss_weight
from svgpipe.stages.images.decode import centre_crop
from svgpipe.stages.images.tensors import as_pixels

from .conftest import Golden, GoldenFolder


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """The recordings were made with one thread; with two, the official code itself differs by up to 2.5e-6."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected.float(), atol=atol, rtol=0)


def tokens_from_map(latents: Tensor) -> Tensor:
    """(B,C,h,w) → (B,h*w,C), row-major, as in caches and recordings."""
    return latents.flatten(2).transpose(1, 2)


def map_from_tokens(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B,h*w,C) → (B,C,h,w): inverse of `tokens_from_map`."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def build_dit(recording: Golden) -> DiT:
    config, state = recording.meta["config"], recording.group("sd.")
    side = math.isqrt(state["pos_embed"].shape[1])
    model = DiT(
        grid=(side, side),
        in_channels=config["in_channels"],
        num_classes=config["num_classes"],
        width=config["hidden_size"],
        depth=config["depth"],
        heads=config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        qk_norm=config["qk_norm"],
        learn_sigma=config["learn_sigma"],
        null_row=config["class_dropout_prob"] > 0,
    )
    close(model.pos_embed, state["pos_embed"], 1e-6)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("name", ["dit_plain", "dit_sigma"])
def test_golden_dit(golden: GoldenFolder, name: str) -> None:
    recording = golden.open(name)
    model = build_dit(recording)
    x, t, y = recording["x"], recording["t"], recording["y"]
    with torch.no_grad():
        close(time_features(t, 256), recording["mid.t_freq"], recording.atol)
        close(model.t_embedder(t) + model.y_embedder(y), recording["mid.c"], recording.atol)
        close(model(x, t, y), recording["out"][..., : x.shape[-1]], recording.atol)
        model.drops_half = False
        close(model(x, t, y), recording["out"], recording.atol)
        state = recording.group("sd.")
        state["pos_embed"] = recording["alt.pos_embed_random"]
        model.load_state_dict(state)
        close(model(x, t, y), recording["alt.out_with_pos_embed_random"], recording.atol)


# Prefixes of the weights, and outputs; `sdq.` is with QK-norm.
TRANSFORMERS = [(name, "sd.", "out") for name in ("dit", "sit", "repa", "lightningdit")]


@pytest.mark.parametrize(("name", "prefix", "out"), [*TRANSFORMERS, ("lightningdit", "sdq.", "outq")])
def test_golden_transformers_of_other_systems(golden: GoldenFolder, name: str, prefix: str, out: str) -> None:
    recording = golden.weights_of(name)
    model = other_transformer(recording, prefix)
    atol = recording.meta["suggested_atol"]
    atol = atol[out] if isinstance(atol, dict) else atol
    with torch.no_grad():
        x, t, y = tokens_from_map(recording["x"]), recording["t"], recording["y"]
        expected = tokens_from_map(recording[out])
        model.drops_half = expected.shape[-1] == x.shape[-1]
        close(model(x, t, y), expected, atol)


def other_transformer(recording: Golden, prefix: str = "sd.") -> DiT:
    """Sizes are read off the tensors; only the number of heads of a width that is not published is not visible."""
    state = {key: value for key, value in recording.group(prefix).items() if not key.startswith("projectors.")}
    config = recording.meta["config"]
    visible = {**state, "blocks.0.attn.q_norm.weight": torch.ones(config["hidden_size"] // config["num_heads"])}
    sizes = dataclasses.asdict(dit_sizes(state if "feat_rope.freqs_cos" in state else visible))
    assert sizes["heads"] == config["num_heads"] and sizes["mlp_ratio"] == config["mlp_ratio"]
    side, qk_norm = sizes.pop("grid"), "blocks.0.attn.q_norm.weight" in state
    assert side == config["input_size"]
    model = DiT(**{**sizes, "grid": (side, side), "qk_norm": qk_norm})
    if model.rotary is not None:
        close(model.rotary.cos, state["feat_rope.freqs_cos"], 1e-6)
        close(model.rotary.sin, state["feat_rope.freqs_sin"], 1e-6)
    close(model.pos_embed, state["pos_embed"], 1e-6)
    model.load_state_dict(convert.transformer_from_official(state))
    return model.eval()


def require_gradients(recording: Golden, model: DiT, rtol: float) -> None:
    """Compare the recorded gradients, relative to the largest entry of each."""
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    recorded = convert.transformer_from_official(recording.group("train.grad."))
    assert recorded
    for key, expected in recorded.items():
        close(grads[key], expected, rtol * float(expected.abs().max()))


def logit_normal_of_normal(n: Tensor) -> Tensor:
    """Times for standard normal draws; `logit_normal` takes uniform ones."""
    return logit_normal(torch.special.ndtr(n.double())).float()


def test_golden_projections_and_loss_of_repa(golden: GoldenFolder) -> None:
    """Its time and velocity run the other way: t → 1 - t, v → -v."""
    recording = golden.weights_of("repa")
    config, atol = recording.meta["config"], recording.meta["suggested_atol"]
    model, weights = other_transformer(recording), recording.group("sd.projectors.")
    projectors = []
    for number, channels in enumerate(config["z_dims"]):
        projectors.append(MLPProjector(config["hidden_size"], config["projector_dim"], channels))
        projectors[-1].load_state_dict({k[2:]: v for k, v in weights.items() if k.startswith(f"{number}.")})
    depth = config["encoder_depth"]
    with torch.no_grad():
        out, _, tokens = model(
            tokens_from_map(recording["x"]), recording["t"], recording["y"], everything=True, tap=depth
        )
    close(out, tokens_from_map(recording["out"]), atol["out"])
    for number, projector in enumerate(projectors):
        close(projector(tokens), recording[f"zs.{number}"], atol["zs"])
    x1, tapped = tokens_from_map(recording["train.images"]), []

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out, _, tokens = model(x, 1 - t, y, everything=True, tap=depth)
        tapped.append(tokens)
        return -out

    # Their log-normal sigma = exp(n) is the time sigma / (1 + sigma), whose logit is normal.
    for part, time in (("train.linear_lognormal", logit_normal_of_normal), ("train.linear_uniform", torch.flatten)):
        noise, t = tokens_from_map(recording[f"{part}.noise"]), 1 - time(recording[f"{part}.draw"]).flatten()
        loss = flow_loss(velocity, x1, noise, t, recording["train.y"])
        close(loss.per_sample, recording[f"{part}.denoising"], atol["train"])
        aligned = torch.stack(
            [representation_loss(p(tapped[-1]), recording[f"train.feature.{i}"]) for i, p in enumerate(projectors)]
        ).mean()
        close(aligned, recording[f"{part}.projection"], atol["train"])
    (loss.mean + 0.5 * aligned).backward()
    rtol = recording.meta["suggested_rtol"]["grads (of each one's largest entry)"]
    found = dict(model.named_parameters()) | {
        f"projectors.{i}.{name}": value for i, p in enumerate(projectors) for name, value in p.named_parameters()
    }
    for key, expected in recording.group("train.grad.").items():
        gradient = found[key].grad
        assert gradient is not None
        close(gradient, expected, rtol * float(expected.abs().max()))


@torch.no_grad()
def test_golden_schedule_of_dit(golden: GoldenFolder) -> None:
    recording = golden.weights_of("dit")
    whole, atol = Process.of_training(), recording.meta["suggested_atol"]["tables"]
    for name, numbers in (("8", equal_steps([8])), ("250", equal_steps([250])), ("3,2,5", equal_steps([3, 2, 5]))):
        assert numbers == recording[f"map.{name}"].tolist()
    assert ddim_steps(8) == recording["map.ddim8"].tolist()
    for prefix, process in (("table1000", whole), ("table8", whole.respaced(equal_steps([8])))):
        for name, table in (
            ("betas", process.betas),
            ("alphas_cumprod", process.abar),
            ("posterior_variance", process.posterior_variance),
            ("posterior_log_variance_clipped", process.posterior_log_variance),
            ("posterior_mean_coef1", process.data_weight),
            ("posterior_mean_coef2", process.noised_weight),
        ):
            torch.testing.assert_close(table, recording[f"{prefix}.{name}"], atol=atol, rtol=1e-12)


def test_golden_loss_of_dit(golden: GoldenFolder) -> None:
    recording = golden.weights_of("dit")
    atol, rtol = recording.meta["suggested_atol"], recording.meta["suggested_rtol"]
    model, process = other_transformer(recording), Process.of_training()
    model.drops_half = False
    x, eps, step = (
        tokens_from_map(recording["train.x"]),
        tokens_from_map(recording["train.noise"]),
        recording["train.t"],
    )
    close(noised(x, eps, step, process), tokens_from_map(recording["train.x_t"]), atol["train.x_t"])
    loss = ddpm_loss(model, x, eps, step, recording["train.y"], process)
    close(loss.squared_error, recording["train.mse"], atol["train.mse"])
    torch.testing.assert_close(loss.bound, recording["train.vb"], rtol=rtol["train.vb"], atol=1e-7)
    total = loss.squared_error + loss.bound
    torch.testing.assert_close(total, recording["train.loss"], rtol=rtol["train.loss"], atol=0)
    total.mean().backward()
    require_gradients(recording, model, rtol["grads (of each one's largest entry)"])


@torch.no_grad()
def test_golden_sampling_of_dit(golden: GoldenFolder) -> None:
    recording = golden.weights_of("dit")
    model, grid = other_transformer(recording), (8, 8)
    model.drops_half = False
    null, half = recording.meta["config"]["num_classes"], slice(0, 2)
    guided = GuidedVelocity(model, null, channels=3)
    both = guided(
        tokens_from_map(recording["cfg.x"][half]), float(recording["cfg.t"][0]), recording["cfg.y"][half], (4, -3)
    )
    close(both, tokens_from_map(recording["cfg.out"][half]), recording.meta["suggested_atol"]["cfg.out"])
    compared = 0
    for name, case in recording.meta["cases"].items():
        if case["clip_denoised"]:
            continue  # DiT's scripts do not clip, because these are latents
        ddim, count = case["loop"] == "ddim_sample_loop", len(case["steps"])
        drawn = recording[f"noise.{name}"] if name != "ddim_cfg" else torch.zeros(count, 2, 4, *grid)
        found = sample_ddpm(
            model,
            tokens_from_map(recording["z"]),
            recording["z_y"],
            null_label=null,
            numbers=ddim_steps(8) if case["respacing"] == "ddim8" else equal_steps([8]),
            guidance=Guidance(case["cfg"], channels=3) if case["cfg"] else None,
            noise=lambda step, drawn=drawn: tokens_from_map(drawn[step][half]),  # type: ignore[misc]
            ddim_eta=case["eta"] if ddim else None,
        )
        close(map_from_tokens(found, grid), recording[f"out.{name}"], case["suggested_atol"])
        compared += 1
    assert compared == 4


@pytest.mark.parametrize(("name", "guidance"), [("nocfg", Guidance()), ("cfg", Guidance(4.0, channels=3))])
@torch.no_grad()
def test_golden_dopri5_of_sit(golden: GoldenFolder, name: str, guidance: Guidance) -> None:
    """The official steps are those of the whole batch, so ours differ. Both are as near to the exact solution."""
    recording = golden.weights_of("sit")
    model, case = other_transformer(recording), recording.meta["cases"][f"ode_dopri5_{name}"]
    z, y, null = tokens_from_map(recording["z"]), recording["z_y"], recording.meta["config"]["num_classes"]
    exact = tokens_from_map(recording[f"exact.ode_dopri5_{name}"])
    official = tokens_from_map(recording[f"out.ode_dopri5_{name}"])
    common: dict[str, Any] = {"null_label": null, "steps": 1, "shift": 1.0, "solver": "dopri5", "guidance": guidance}
    found = sample(model, z, y, **common)
    distance = (found - exact).abs().max().item()
    tolerance = 1e-3 * exact.abs().max().item()
    assert max(distance, case["distance_to_exact"]) <= tolerance
    close(found, official, tolerance)

    def field(x: Tensor, t: Tensor, samples: Tensor) -> Tensor:
        return GuidedVelocity(model, null, channels=guidance.channels)(x, t, y[samples], guidance.weights(0, 1, 0.0))

    close(integrate(field, z, (1e-6, 1e-7)), exact, recording.meta["suggested_atol"][f"exact.ode_dopri5_{name}"])
    for place in range(2):  # other company, in a batch of the same size: in another one, products are rounded otherwise
        company = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
        company[place] = z[place]
        close(sample(model, company, y, **common)[place], found[place], 2e-4)


def test_golden_velocity_loss_of_sit(golden: GoldenFolder) -> None:
    recording = golden.weights_of("sit")
    model, atol = other_transformer(recording), recording.meta["suggested_atol"]["train.loss"]
    x1, x0 = (tokens_from_map(recording[f"train.{name}"]) for name in ("x1", "x0"))
    loss = flow_loss(model, x1, x0, recording["train.t"], recording["train.y"])
    close(loss.mean, recording["train.loss"].mean(), atol)
    close(loss.per_sample, recording["train.loss"], atol)
    loss.mean.backward()
    require_gradients(recording, model, 1e-4)


# (recording, case): solver, shift, guidance. The number of points is one more than that of the steps.
SAMPLED: list[tuple[str, str, Solver, float, Guidance]] = [
    ("lightningdit", "euler_shift_cfg_interval", "euler", 0.3, Guidance(6.7, "interval-0.125-1", 3)),
    ("lightningdit", "euler_shift_nocfg", "euler", 0.3, Guidance()),
    ("lightningdit", "euler_noshift_cfg", "euler", 1.0, Guidance(6.7, channels=3)),
    ("sit", "ode_euler_cfg", "euler", 1.0, Guidance(4.0, channels=3)),
    ("sit", "ode_heun2_cfg", "heun", 1.0, Guidance(4.0, channels=3)),
    ("repa", "ode_euler_nocfg", "euler", 1.0, Guidance()),
    ("repa", "ode_euler_interval", "euler", 1.0, Guidance(1.8, "interval-0.3-1")),
]


@pytest.mark.parametrize(("name", "case", "solver", "shift", "guidance"), SAMPLED)
def test_golden_samples_of_other_systems(
    golden: GoldenFolder, name: str, case: str, solver: Solver, shift: float, guidance: Guidance
) -> None:
    """SiT and LightningDiT guide three channels. In REPA time runs from data to noise, and so does the velocity."""
    recording = golden.weights_of(name)
    model, about = other_transformer(recording), recording.meta["cases"][case]

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return -model(x, 1 - t, y) if name == "repa" else model(x, t, y)

    noise, points = tokens_from_map(recording["z"]), about["args"]["num_steps"]
    steps = points if name == "repa" else points - 1
    where = {"null_label": model.null_label, "steps": steps}
    found = sample(velocity, noise, recording["z_y"], **where, shift=shift, solver=solver, guidance=guidance)
    close(found, tokens_from_map(recording[f"out.{case}"]), about["suggested_atol"])


@pytest.mark.parametrize(
    ("name", "case", "guidance", "sde"),
    [
        ("sit", "sde_sigma_mean_nocfg", Guidance(), None),
        ("sit", "sde_sigma_mean_cfg", Guidance(4.0, channels=3), None),
        ("sit", "sde_decreasing_euler", Guidance(), SDE("decreasing", "euler", 0.08)),
        ("repa", "sde_nocfg", Guidance(), None),
        ("repa", "sde_interval", Guidance(1.8, "interval-0.3-1"), None),
    ],
)
def test_golden_stochastic_samples(
    golden: GoldenFolder, name: str, case: str, guidance: Guidance, sde: SDE | None
) -> None:
    """SiT draws noise for both halves of guidance; that of the unconditional one is never used."""
    recording = golden.weights_of(name)
    model, about = other_transformer(recording), recording.meta["cases"][case]

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return -model(x, 1 - t, y) if name == "repa" else model(x, t, y)

    start, recorded = tokens_from_map(recording["z"]), recording[f"noise.{case}"]
    found = sample(
        velocity,
        start,
        recording["z_y"],
        null_label=model.null_label,
        steps=about["args"]["num_steps"],
        shift=1.0,
        solver="sde",
        guidance=guidance,
        noise=lambda step: tokens_from_map(recorded[step, : len(start)]),
        sde=sde,
    )
    close(found, tokens_from_map(recording[f"out.{case}"]), about["suggested_atol"])


@pytest.mark.parametrize("case", ["released", "plain"])
def test_golden_loss_of_lightningdit(golden: GoldenFolder, case: str) -> None:
    recording = golden.weights_of("lightningdit")
    model, atol = other_transformer(recording), recording.meta["suggested_atol"]["train"]
    part, released = recording.group(f"train.{case}."), case == "released"
    x1, x0 = tokens_from_map(recording["train.x1"]), tokens_from_map(part["x0"])
    # The official code draws a normal value; here it is a function of a uniform one.
    t = logit_normal_of_normal(part["normal"]) if released else part["u"]
    loss = flow_loss(model, x1, x0, t, recording["train.y"], cosine=released)
    close(loss.per_sample, part["mse"], atol)
    close(loss.cosine, part["cos_loss"] if released else torch.zeros(len(x1)), atol)
    close(loss.mean, part["loss"], atol)
    loss.mean.backward()
    if released:
        require_gradients(recording, model, 1e-4)


def test_golden_flow_train(golden: GoldenFolder) -> None:
    recording = golden.open("flow_train")
    rtol = recording.meta["suggested_rtol"]
    for name, case in recording.meta["cases"].items():
        weights = golden.weights_of(case["weights_from"])
        model = build_dit(weights)
        part = recording.group(f"{name}.")
        torch.manual_seed(case["torch_manual_seed"])
        z0 = torch.randn_like(part["x1"])
        u = torch.rand(len(z0))
        torch.randn_like(z0)  # drawn and multiplied by zero in the official code
        torch.testing.assert_close(z0, part["z0"], rtol=0, atol=0)
        torch.testing.assert_close(u, part["u"], rtol=0, atol=0)
        t = shift_time(u, case["timestep_shift"])
        torch.testing.assert_close(t, part["t"], rtol=0, atol=1e-7)
        y = part["y"]
        if "drop_u" in part:
            torch.testing.assert_close(torch.rand(len(y)), part["drop_u"], rtol=0, atol=0)
            y = drop_labels(y, part["drop_u"], case["class_dropout_prob_used"], model.null_label)
            assert torch.equal(y, part["y_effective"])
        loss = flow_loss(model, part["x1"], z0, t, y)
        torch.testing.assert_close(loss.per_sample, part["mse"], rtol=rtol, atol=0)
        torch.testing.assert_close(loss.mean, part["loss"], rtol=rtol, atol=0)
        assert loss.mean.item() == pytest.approx(case["loss"], rel=rtol)
        loss.mean.backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        for key, expected in part.items():
            if key.startswith("grad."):
                found = grads[key.removeprefix("grad.")]
                torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-6)
        for key, norm in case["grad_l2"].items():
            assert grads[key].norm().item() == pytest.approx(norm, rel=rtol * 10, abs=1e-6), key


def test_golden_flow_sample(golden: GoldenFolder) -> None:
    recording = golden.open("flow_sample")
    for name, case in recording.meta["cases"].items():
        model = build_dit(golden.weights_of(case["weights_from"]))
        calls: list[int] = []

        def velocity(x: Tensor, t: Tensor, y: Tensor, model: DiT = model, calls: list[int] = calls) -> Tensor:
            calls.append(len(x))
            return model(x, t, y)

        unguided = case["null_cond"] is None
        guidance = Guidance() if unguided else Guidance(case["cfg"], case["cfg_mode"])
        z, y = recording[case["z"]], recording[case["y"]]
        out = sample(
            velocity,
            z,
            y,
            null_label=model.null_label,
            steps=case["sample_steps"],
            shift=case["timestep_shift"],
            solver=case["mode"],
            guidance=guidance,
        )
        close(out, recording[f"out.{name}"], recording.atol)
        assert out.abs().max().item() == pytest.approx(case["out_absmax"], abs=recording.atol)
        # The official sampler calls the model twice whenever a null label is given. Here both halves share a call, and
        # a half with weight 0 is not computed.
        per_step = {"euler": 1, "heun": 2}[case["mode"]]
        assert len(calls) == case["sample_steps"] * per_step
        assert case["model_calls"] == len(calls) * (1 if unguided else 2)


def test_golden_flow_tseq(golden: GoldenFolder) -> None:
    recording = golden.open("flow_tseq")
    for name, case in recording.meta["cases"].items():
        grid = time_grid(case["sample_steps"], case["timestep_shift"])
        close(grid, recording[f"t.{name}"], recording.atol)
        close((grid[1:] - grid[:-1])[:, None], recording[f"dt.{name}"], recording.atol)
        assert (grid[0].item(), grid[-1].item()) == (case["first"], case["last"])


def test_golden_time_shift_of_rae(golden: GoldenFolder) -> None:
    """The recording has noise at time 1, svgpipe at time 0: its shift is the inverse."""
    recorded = golden.weights_of("rae").group("shift.")
    shift = math.sqrt(768 * 16 * 16 / 4096)  # released: of the size of a latent and a base
    u = recorded["u"]
    close(1 - shift_time(1 - u, 1 / shift), recorded["t_released"], 1e-6)
    evaluated = recorded["grid_released"]
    grid = 1 - shift_time(torch.linspace(0, 0.999, len(evaluated), dtype=torch.float64), 1 / shift)
    close(grid, evaluated, 1e-6)


def test_golden_decoder(golden: GoldenFolder) -> None:
    recording = golden.open("decoder")
    config = recording.meta["config"]
    decoder = Decoder(
        **{k: config[k] for k in ("z_channels", "ch", "ch_mult", "num_res_blocks", "attn_resolutions")},
        resolution=config["resolution"],
        out_ch=config["out_ch"],
        dropout=config["dropout"],
    ).eval()
    found = [k for k, m in decoder.named_modules() if type(m).__name__ == "AttnBlock"]
    assert sorted(found) == sorted(recording.meta["attention_modules"])
    decoder.load_state_dict(convert.decoder_from_official(recording.group("sd.")))
    with torch.no_grad():
        out = decoder(recording["z"])
    close(out, recording["out"], recording.atol)
    summary = recording.meta["out_summary"]
    assert list(out.shape) == summary["shape"]
    assert out.mean().item() == pytest.approx(summary["mean"], abs=1e-4)


def kl_autoencoder(state: dict[str, Tensor]) -> KLAutoencoder:
    """Build the model that released weights belong to."""
    official = kl_from_official(state)
    sizes = dataclasses.asdict(official.sizes)
    z, attention = sizes["z_channels"], sizes.pop("attention")
    encoder = Encoder(**sizes, attention=attention)
    decoder = Decoder(**sizes, attn_resolutions=(256 // encoder.factor,) if attention else (), resolution=256)
    model = KLAutoencoder(encoder, decoder, z).eval()
    model.load_trained_state(official.state)
    return model


def older_names(recording: Golden, state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The weights of diffusers under the names that older diffusers and CompVis gave them, CompVis in a whole model."""
    older, compvis = recording.meta["older_diffusers_keys"], recording.meta["compvis_keys"]
    flat = {
        f"{a}.{b}.weight" for a in ("encoder.mid.attn_1", "decoder.mid.attn_1") for b in ("q", "k", "v", "proj_out")
    }
    original = {compvis[key]: value for key, value in state.items()}
    original = {key: value[:, :, None, None] if key in flat else value for key, value in original.items()}
    whole = {f"first_stage_model.{key}": value for key, value in original.items()} | {"model.x": torch.zeros(1)}
    return [{older.get(key, key): value for key, value in state.items()}, original, whole]


@torch.no_grad()
def test_golden_sd_vae(golden: GoldenFolder) -> None:
    recording = golden.open("sd_vae")
    atol, state = recording.meta["suggested_atol"], recording.group("sd.")
    model, channels = kl_autoencoder(state), recording.meta["config"]["latent_channels"]
    moments = model.quant_conv(model.encoder(recording["image"]))
    close(moments, recording["moments"], atol["moments"])
    posterior = model.posterior((recording["image"] + 1) / 2)
    close(posterior.mean, recording["mean"], atol["mean"])
    close(posterior.log_variance, recording["logvar"], atol["logvar"])
    close(posterior.std, recording["std"], atol["std"])
    close(posterior.draw(recording["noise"]), recording["sample"], atol["sample"])
    torch.testing.assert_close(
        posterior.divergence(), recording["kl"], rtol=recording.meta["suggested_rtol"]["kl"], atol=0
    )
    factor = recording.meta["config"]["scaling_factor"]
    close(posterior.draw(recording["noise"]) * factor, recording["latent"], atol["latent"])
    close(model.decode(recording["latent"] / factor), recording["decoded"], atol["decoded"])
    stored = model.encode((recording["image"] + 1) / 2)
    assert stored.shape[1] == 2 * channels
    close(model.decode(model.latents(stored)), recording["decoded_mode"], atol["decoded_mode"])
    clamped = Posterior.of(recording["clamp.raw_moments"])
    close(clamped.log_variance, recording["clamp.logvar"], atol["clamp"])
    torch.testing.assert_close(clamped.std, recording["clamp.std"], rtol=1e-5, atol=atol["clamp"])
    for names in older_names(recording, state):
        assert all(
            torch.equal(a, b) for a, b in zip(kl_autoencoder(names).parameters(), model.parameters(), strict=True)
        )


@torch.no_grad()
def test_golden_va_vae(golden: GoldenFolder) -> None:
    recording = golden.open("va_vae")
    atol, state = recording.meta["suggested_atol"], recording.group("sd.")
    model = kl_autoencoder(state)
    found = [k for k, m in model.named_modules() if type(m).__name__ == "AttnBlock"]
    assert sorted(found) == sorted(recording.meta["attention_modules"])
    close(model.quant_conv(model.encoder(recording["image"])), recording["moments"], atol["moments"])
    posterior = model.posterior((recording["image"] + 1) / 2)
    close(posterior.mean, recording["mean"], atol["mean"])
    close(posterior.log_variance, recording["logvar"], atol["logvar"])
    close(posterior.draw(recording["noise"]), recording["sample"], atol["sample"])
    torch.testing.assert_close(
        posterior.divergence(), recording["kl"], rtol=recording.meta["suggested_rtol"]["kl"], atol=0
    )
    decoded = model.decode(recording["sample"])
    close(decoded, recording["decoded"], atol["decoded"])
    pixels = as_pixels(decoded).astype(int)
    assert np.abs(pixels - recording["decoded_uint8"].numpy()).max() <= atol["decoded_uint8"]
    projected = F.conv2d(recording["sample"], state["linear_proj.weight"].float())
    close(projected, recording["projected"], atol["projected"])
    latents = recording["stats.latents"]
    mean, std = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)
    close(mean, recording["stats.mean"], atol["stats"])
    close(std, recording["stats.std"], atol["stats"])
    normalised = (latents - mean) / std * recording.meta["latent_multiplier"]
    close(normalised, recording["stats.normalised"], atol["stats"])


def test_golden_vf_loss(golden: GoldenFolder) -> None:
    recording = golden.open("vf_loss")
    atol, rtol = recording.meta["suggested_atol"]["terms"], recording.meta["suggested_rtol"]["graph"]
    for case, margins in recording.meta["term_cases"].items():
        z, part = recording["terms.z"].clone().requires_grad_(), f"terms.{case}"
        distances = distance_matrix_loss(z, recording["terms.aux"], margins["distmat_margin"]).mean()
        cosines = marginal_cosine_loss(z, recording["terms.aux"], margins["cos_margin"]).mean()
        close(distances, recording[f"{part}.distmat"], atol)
        close(cosines, recording[f"{part}.cos"], atol)
        close(torch.autograd.grad(distances, z)[0], recording[f"{part}.grad_z_distmat"], atol)
        close(torch.autograd.grad(cosines, z)[0], recording[f"{part}.grad_z_cos"], atol)
    for case, settings in recording.meta["graph_cases"].items():
        names = ("feat", "enc_last_w", "proj_w", "last_w")
        leaves = {name: recording[f"graph.{name}"].clone().requires_grad_() for name in names}
        loss = _vf_graph(recording, leaves, settings)
        torch.testing.assert_close(loss.detach(), recording[f"graph.{case}.loss"], rtol=rtol, atol=0)
        loss.backward()
        for name, leaf in leaves.items():
            expected = recording[f"graph.{case}.grad.{name}"]
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def _vf_graph(recording: Golden, leaves: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """Return the whole loss of the recording's small autoencoder."""
    image = recording["graph.image"]
    posterior = Posterior.of(F.conv2d(leaves["feat"], leaves["enc_last_w"], padding=1))
    latents = posterior.draw(recording["graph.noise"])
    r = F.conv2d(F.interpolate(latents, scale_factor=8.0, mode="nearest"), leaves["last_w"], padding=1)
    loss = generator_loss(
        image,
        r,
        perceptual=lambda a, b: 0.7 * (a - b).square().mean(dim=(1, 2, 3), keepdim=True),
        perceptual_weight=1.0,
        discriminator=None,
        last_layer=leaves["last_w"],
        discriminator_weight=0.0,
        discriminator_on=False,
    )
    assert loss.nll.item() == pytest.approx(settings["nll_loss"], rel=1e-4)
    divergence = posterior.divergence().mean()
    assert divergence.item() == pytest.approx(settings["kl_loss"], rel=1e-4)
    projected, aux = F.conv2d(latents, leaves["proj_w"]), recording["graph.aux"]
    distances = distance_matrix_loss(projected, aux, settings["distmat_margin"])
    vision = (distances + marginal_cosine_loss(projected, aux, settings["cos_margin"])).mean()
    assert vision.item() == pytest.approx(settings["vf_loss"], rel=1e-4)
    setting = settings["vf_weight_setting"]
    weight = torch.tensor(setting)
    if settings["adaptive_vf"]:
        weight = vision_loss_weight(loss.nll, vision, leaves["enc_last_w"], setting)
    assert weight.item() == pytest.approx(settings["vf_weight"], rel=1e-4)
    return loss.total + settings["kl_weight"] * divergence + weight * vision


def build_residual(recording: Golden) -> ResidualEncoder:
    config = recording.meta["config"]
    model = ResidualEncoder(
        image_size=config["img_size"],
        patch_size=config["patch_size"],
        channels=config["output_dim"],
        depth=config["num_layers"],
        width=config["hidden_dim"],
        heads=config["num_heads"],
        mlp_ratio=config["mlp_dim"] / config["hidden_dim"],
    )
    model.load_state_dict(convert.residual_from_official(recording.group("sd.")))
    return model.eval()


def test_golden_residual(golden: GoldenFolder) -> None:
    recording = golden.open("residual")
    model = build_residual(recording)
    with torch.no_grad():
        out = model(recording["x"]).flatten(2)
    close(out, recording["out"], recording.atol)
    assert out.mean().item() == pytest.approx(recording.meta["out_summary"]["mean"], abs=1e-5)


def test_golden_residual_has_the_official_size(golden: GoldenFolder) -> None:
    sizes = golden.weights_of("residual").meta["official_sizes"]
    model = ResidualEncoder(
        image_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        channels=sizes["output_dim"],
        depth=sizes["num_layers"],
        width=sizes["hidden_dim"],
        heads=sizes["num_heads"],
    )
    assert sum(p.numel() for p in model.parameters()) == sizes["parameters"]


def test_golden_align(golden: GoldenFolder) -> None:
    recording = golden.open("align")
    for name, case in recording.meta["cases"].items():
        part = recording.group(f"{name}.")
        frozen = part["h"].unsqueeze(-1)
        residual = part["h_vit"].clone().unsqueeze(-1).requires_grad_()
        stats = Alignment.statistics(frozen, residual)
        close(stats, part["stats"], recording.atol)
        train = Alignment().train()
        out = train(frozen, residual)
        close(out.squeeze(-1), part["out"], recording.atol)
        out.backward(part["upstream"].unsqueeze(-1))
        assert residual.grad is not None
        torch.testing.assert_close(residual.grad.squeeze(-1), part["grad_h_vit"], rtol=1e-4, atol=1e-5)
        # In eval mode the same scalars are frozen, and a sample does not depend on its batch.
        train.eval()
        train.freeze(stats)
        together = train(frozen, residual).squeeze(-1)
        close(together, part["out"], recording.atol)
        assert torch.equal(train(frozen[:1], residual[:1]).squeeze(-1), together[:1])
        if case["batch_dependence"] is not None:
            alone = Alignment().train()(frozen[:1], residual[:1]).squeeze(-1)
            close(alone, part["out_first_sample_alone"], recording.atol)
            assert (alone - together[:1]).abs().max().item() == pytest.approx(
                case["batch_dependence"], abs=recording.atol
            )


class _RecordedBackbone(Backbone):
    """A backbone that returns recorded tokens. Everything after it is the real code."""

    def __init__(self, channels: int, grid: tuple[int, int]) -> None:
        torch.nn.Module.__init__(self)
        self._channels, self._grid = channels, grid

    @property
    def channels(self) -> int:
        return self._channels

    @property
    def grid(self) -> int:
        return self._grid[0]


def test_golden_encode(golden: GoldenFolder) -> None:
    recording = golden.open("encode")
    config = recording.meta["config"]
    grid = (config["H"], config["W"])
    frozen = map_from_tokens(recording["tokens"], grid)
    residual = map_from_tokens(recording["residual"].transpose(1, 2), grid)
    backbone = _RecordedBackbone(config["D1"], grid)
    for name, case in recording.meta["cases"].items():
        extra = case["extra_vit_config"]
        channels = 0 if extra is None else extra["output_dim"]
        encoder = None
        if extra is not None:
            # Only its sizes matter here: join() is given the recorded output.
            encoder = ResidualEncoder(image_size=grid[0], patch_size=1, channels=channels, depth=1, width=8, heads=2)
        model = SVGAutoencoder(
            backbone,
            Decoder(z_channels=config["D1"] + channels, ch=32, ch_mult=(1,), num_res_blocks=1),
            encoder,
            align=extra is not None and extra["use_outnorm"],
            mask_ratio=0.0 if extra is None else extra["mask_ratio"],
        ).train(case["training"])
        draws = None
        if case["training"]:
            with torch.no_grad():
                model.mask_token.copy_(recording["mask_token"].unsqueeze(-1))
            draws = recording["mask_u"]
        elif model.alignment is not None:
            model.alignment.freeze(Alignment.statistics(frozen, residual))
        z = frozen if encoder is None else model.join(frozen, residual, draws)
        close(z.detach(), recording[f"z.{name}"], recording.atol)
        assert list(z.shape) == case["z_shape"]
        mean, std = (recording[k][..., : z.shape[1]] for k in ("stats_mean", "stats_std"))
        close(
            (tokens_from_map(z.detach()) - mean) / std,
            recording[f"seq_normalised.{name}"],
            recording.atol,
        )
    stats = golden.weights_of("stats")
    real = recording.group("real.")
    close(
        (tokens_from_map(real["z"]) - stats["mean"]) / stats["std"],
        real["seq_normalised"],
        recording.atol,
    )
    rows, columns = real["z"].shape[2:]
    map_back = map_from_tokens(real["seq_sampled"] * stats["std"] + stats["mean"], (rows, columns))
    close(map_back, real["z_denormalised"], recording.atol)


def dinov3_name(recording: Golden) -> str:
    """timm has separate models with and without qkv biases."""
    biased = recording.meta["config"]["qkv_bias"]
    return "vit_small_plus_patch16_dinov3" + ("_qkvb" if biased else "")


def build_dinov3(recording: Golden, input_size: int, name: str) -> Backbone:
    config = recording.meta["config"]
    gated = config["ffn_layer"].startswith("swiglu")
    kwargs = {
        "embed_dim": config["embed_dim"],
        "depth": config["depth"],
        "num_heads": config["num_heads"],
        "mlp_ratio": config["ffn_ratio"] * (2 / 3 if gated else 1),
        "swiglu_mlp": gated,
        "rope_temperature": config["pos_embed_rope_base"],
        "num_reg_tokens": config["n_storage_tokens"],
        "patch_size": config["patch_size"],
    }
    return Backbone(name, input_size=input_size, model_kwargs=kwargs)


def test_golden_dinov3(golden: GoldenFolder) -> None:
    recording = golden.open("dinov3")
    meta_keys = recording.group("sd.")
    inputs = sorted({k.split(".")[0] for k in recording.meta["tensors"] if k.startswith("in")})
    backbone = build_dinov3(recording, recording[f"{inputs[0]}.x"].shape[-1], dinov3_name(recording))
    prefix = backbone.model.num_prefix_tokens
    for periods, suffix in ((None, ""), (recording["periods_bf16"], "_bf16_periods")):
        state = dict(meta_keys)
        if periods is not None:
            state["rope_embed.periods"] = periods
        backbone.load(state)
        for name in inputs:
            x = recording[f"{name}.x"]
            with torch.no_grad():
                tokens = backbone.model.forward_features(x)
                patches = tokens_from_map(backbone.features(x))
            close(patches, recording[f"{name}.x_norm_patchtokens{suffix}"], recording.atol)
            if periods is None:
                close(tokens[:, 0], recording[f"{name}.x_norm_clstoken"], recording.atol)
                close(tokens[:, 1:prefix], recording[f"{name}.x_storage_tokens"], recording.atol)


def test_golden_dinov3_plain_variant_refuses_biases(golden: GoldenFolder) -> None:
    recording = golden.weights_of("dinov3")
    if not recording.meta["config"]["qkv_bias"]:
        pytest.skip("this recording has no qkv biases to drop")
    with pytest.raises(ValueError, match="qkvb"):
        build_dinov3(recording, 64, "vit_small_plus_patch16_dinov3").load(recording.group("sd."))


def test_golden_encode_e2e(golden: GoldenFolder) -> None:
    recording = golden.open("encode_e2e")
    dino, residual = (golden.weights_of(name) for name in recording.meta["weights_from"])
    x = recording["x"]
    backbone = build_dinov3(dino, x.shape[-1], dinov3_name(dino))
    backbone.load(dino.group("sd."))
    encoder = build_residual(residual)
    channels = backbone.channels + encoder.channels
    decoder = Decoder(z_channels=channels, ch=32, ch_mult=(1,), num_res_blocks=1)
    model = SVGAutoencoder(backbone, decoder, encoder, mask_ratio=0.0).eval()
    images = x * backbone.std + backbone.mean
    assert model.alignment is not None

    def official(images: Tensor) -> Tensor:
        """Alignment by the batch, like the official code in eval mode; everything else in eval mode."""
        assert model.alignment is not None
        model.alignment.train()
        with torch.no_grad():
            return model.encode(images)

    z = official(images)
    close(z, recording["z"], recording.atol)
    alone = official(images[:1])
    close(alone, recording["z_first_image_alone"], recording.atol)
    dependence = recording.meta["batch_dependence"]
    moved = (alone - z[:1]).abs()
    frozen = backbone.channels
    assert moved[:, :frozen].max().item() == pytest.approx(dependence["frozen_channels"], abs=recording.atol)
    assert moved[:, frozen:].max().item() == pytest.approx(dependence["residual_channels"], abs=recording.atol)
    sequence = (tokens_from_map(z) - recording["stats_mean"]) / recording["stats_std"]
    close(sequence, recording["seq_normalised"], recording.atol * 10)  # divided by stds below one


def test_golden_loss(golden: GoldenFolder) -> None:
    recording = golden.open("loss")
    config, rtol = recording.meta["config"], recording.meta["suggested_rtol"]
    state = recording.group("disc.")
    layers = sum(1 for k in state if k.endswith("running_mean"))

    def stand_in(x: Tensor, r: Tensor) -> Tensor:
        return config["p_scale"] * (x - r).square().mean(dim=(1, 2, 3), keepdim=True)

    for step in config["steps"]:
        discriminator = PatchDiscriminator(width=config["ndf"], layers=layers).train()
        discriminator.load_state_dict(state)
        last_layer = recording["last_w"].clone().requires_grad_()
        r = F.conv2d(recording["feat"], last_layer, padding=1)
        logged = recording.meta["cases"][f"step{step}.opt0"]
        on = step >= config["disc_start"]
        loss = generator_loss(
            recording["real"],
            r,
            perceptual=stand_in,
            perceptual_weight=1.0,
            discriminator=discriminator,
            last_layer=last_layer,
            discriminator_weight=config["disc_weight"],
            discriminator_on=on,
        )
        assert loss.nll.item() == pytest.approx(logged["train/nll_loss"], rel=rtol)
        # Officially logged as "rec_loss": the L1 loss with the perceptual distance added to every element.
        assert (loss.l1 + loss.perceptual).item() == pytest.approx(logged["train/rec_loss"], rel=rtol)
        assert loss.perceptual.item() == pytest.approx(logged["train/p_loss"], rel=rtol)
        torch.testing.assert_close(loss.total.detach(), recording[f"step{step}.opt0.loss"], rtol=rtol, atol=0)
        (grad,) = torch.autograd.grad(loss.total, last_layer, retain_graph=True)
        expected = recording[f"step{step}.opt0.grad_last_w"]
        torch.testing.assert_close(grad, expected, rtol=rtol, atol=rtol * expected.abs().max().item())

        discriminator.load_state_dict(state)
        g = -discriminator(r).mean()
        assert g.item() == pytest.approx(logged["train/g_loss"], rel=rtol)
        nll = ((recording["real"] - r).abs() + stand_in(recording["real"], r)).sum() / len(r)
        weight = config["disc_weight"] * adaptive_weight(nll, g, last_layer).item()
        assert weight == pytest.approx(logged["train/d_weight"], rel=rtol)
        if on:
            assert loss.adaptive_weight.item() == pytest.approx(logged["train/d_weight"], rel=rtol)

        discriminator.load_state_dict(state)
        d_loss = discriminator_loss(discriminator, recording["real"], r, "hinge") * float(on)
        torch.testing.assert_close(d_loss.detach(), recording[f"step{step}.opt1.loss"], rtol=rtol, atol=1e-7)
        d_loss.backward()
        first = discriminator.main[0].weight
        assert isinstance(first, Tensor)
        assert first.grad is not None
        torch.testing.assert_close(first.grad, recording[f"step{step}.opt1.grad_disc_conv0"], rtol=rtol, atol=1e-6)


def test_golden_crop(golden: GoldenFolder) -> None:
    recording = golden.open("crop")
    for name, case in recording.meta["cases"].items():
        source = recording[f"{name}.in"].numpy()
        assert source.shape[:2] == (case["h"], case["w"])
        found = centre_crop(Image.fromarray(source), case["image_size"])
        np.testing.assert_array_equal(np.asarray(found), recording[f"{name}.out"].numpy())


def test_golden_stats(golden: GoldenFolder) -> None:
    """The published statistics: their metadata, and the inverse of the normalisation."""
    recording = golden.open("stats")
    for key in ("mean", "std"):
        for group, summary in recording.meta["summary"][key].items():
            values = recording[key]
            if "_" in group:
                first, last = (int(part) for part in group.split("_")[1:])
                values = values[..., first : last + 1]
            assert list(values.shape) == summary["shape"]
            for statistic, value in (
                ("min", values.min()),
                ("max", values.max()),
                ("mean", values.double().mean()),
                ("std", values.double().std()),
            ):
                assert value.item() == pytest.approx(summary[statistic], abs=1e-6), (key, group, statistic)
