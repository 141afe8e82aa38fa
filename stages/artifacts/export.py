"""`svgpipe export`: the weights of a diffusion model as plain safetensors, with everything needed to use them.

model.safetensors       the transformer
statistics.safetensors  channel_mean, channel_std: feature = latent * std + mean
config.json             arguments of the model, classes, time shift of the sampler, inputs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from svgpipe.manifests.checkpoint import load_tensors, save_tensors
from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.filesystem import Location, children, make_directory, remove_partials
from svgpipe.manifests.lock import LOCK_NAME, locked
from svgpipe.manifests.manifest import Json, write_json
from svgpipe.manifests.model_manifests import EMA, STATISTICS_FILE, weights_file
from svgpipe.models.flow import shift_of

from ..networks.diffusion import TrainedDiffusion, dit_arguments, open_diffusion

MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    weights: str
    step: int
    directory: Location


def export(source: Location, out: Location, weights: str = EMA) -> Exported:
    """Write the chosen weights of `source` to the new or empty folder `out`.

    Args:
        source: a finished diffusion model, an unfinished run (its newest checkpoint is used), or a checkpoint
            (`RUN/checkpoints/step-00001000`).
        out: folder to create.
        weights: `ema` (the first decay), `ema-DECAY` or `raw`.

    Returns:
        Folder, weights and step.

    Raises:
        ArtifactError: no diffusion model, a damaged file, or files in `out`.
        UsageError: no such weights.
        BusyError: another process exports to `out`.
    """
    model = open_diffusion(source)
    config = DiffusionSection.model_validate(model.config)
    name = model.weights_name(weights)
    _require_free(out)
    tensors = load_tensors(model.directory / weights_file(name), model.content[weights_file(name)])
    statistics = load_tensors(model.directory / STATISTICS_FILE, model.content[STATISTICS_FILE])
    make_directory(out)
    with locked(out):
        remove_partials(out)
        save_tensors(out / MODEL_FILE, tensors)
        save_tensors(out / STATISTICS_FILE, statistics)
        write_json(out / CONFIG_FILE, _config(model, config, name))
    return Exported(name, model.step, out)


def _require_free(out: Location) -> None:
    """Check that `out` is new, empty, or holds an unfinished export (no config.json).

    Raises:
        ArtifactError: it holds something else.
    """
    left = {MODEL_FILE, STATISTICS_FILE, LOCK_NAME}
    names = {path.name for path in children(out)}
    foreign = [name for name in names - left if not name.endswith((".partial", ".claim"))]
    if foreign or (out.exists() and not out.is_dir()):
        raise ArtifactError(f"{out}: expected a new or empty folder, found files in it. Give another one.")


def _config(model: TrainedDiffusion, config: DiffusionSection, name: str) -> Json:
    """Return the content of config.json, which is written last."""
    training, sampling = (shift_of(s, model.cells, model.channels) for s in (config.time_shift, config.sample_shift))
    arguments: dict[str, Any] = dit_arguments(
        config, grid=model.grid, channels=model.channels, num_classes=len(model.class_names)
    )
    return {
        "model": arguments,
        "class_names": model.class_names,
        "weights": name,
        "step": model.step,
        "objective": config.objective,
        "time_shift": {"training": training, "sampling": sampling},  # of objective flow
        "made_from": model.made_from,
    }
