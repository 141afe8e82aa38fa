"""The diffusion model of a sampling, the model that guides it, and their settings, checked against the recipe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.errors import MismatchError, UsageError
from svgpipe.manifests.evaluation_section import EvaluationSection, SDESection
from svgpipe.manifests.manifest import InputRef
from svgpipe.models.ddpm import ddim_steps, equal_steps
from svgpipe.models.flow import shift_of
from svgpipe.models.guidance import Guidance
from svgpipe.models.sampler import SDE

from .diffusion import TrainedDiffusion
from .sampling import DDPM_SOLVERS, SamplerSettings


def require_sampling(config: EvaluationSection, model: DiffusionSection, *, guided: bool) -> None:
    """Check the solver, the guidance and the numbers of steps.

    Args:
        config: section `evaluation` of a recipe.
        model: section `diffusion` of the recipe of the model.
        guided: whether a worse model guides it.

    Raises:
        UsageError: the solver is not one for the model, or cannot make as many steps; the mode is unknown or makes no
            sense with a guide; or internal guidance of a model without an auxiliary head, or beside a guide.
    """
    objective = model.objective
    if (config.solver in DDPM_SOLVERS) != (objective == "ddpm"):
        fitting = "ddpm or ddim" if objective == "ddpm" else "euler, heun, multistep, sde or dopri5"
        raise UsageError(
            f"evaluation.solver: expected {fitting} for a model of objective {objective}, found {config.solver}."
        )
    _require_steps(config)
    try:
        guidance = Guidance(1.0, config.guidance_mode, config.guidance_channels)
    except ValueError as error:
        raise UsageError(f"evaluation.guidance_mode: {error}") from error
    if objective == "ddpm" and guidance.kind == "cfg_star":
        raise UsageError(
            "evaluation.guidance_mode: cfg_star changes velocities, which a model of objective ddpm has not."
        )
    if (guided or config.internal_guidance) and guidance.kind == "cfg_star":
        raise UsageError(
            "evaluation.guidance_mode: cfg_star needs unconditional velocities, which neither a guide nor an auxiliary "
            "head has."
        )
    if config.internal_guidance:
        _require_auxiliary(model, guided=guided)


def _require_auxiliary(model: DiffusionSection, *, guided: bool) -> None:
    if model.model.auxiliary_depth is None:
        raise UsageError(
            "evaluation.internal_guidance: the model has no auxiliary head. Train one with, for example, "
            f"diffusion.model.auxiliary_depth={max(1, model.model.depth // 3)}."
        )
    if guided:
        raise UsageError(
            "evaluation.internal_guidance: the auxiliary head replaces the model of --guide; give one only."
        )


def require_guided_channels(config: EvaluationSection, channels: int) -> None:
    """Check the number of guided channels.

    Raises:
        UsageError: the model has fewer.
    """
    if (config.guidance_channels or 0) > channels:
        raise UsageError(
            f"evaluation.guidance_channels: expected at most the model's {channels} channels, found "
            f"{config.guidance_channels}."
        )


def _require_steps(config: EvaluationSection) -> None:
    if config.solver == "dopri5" and (len(config.steps) > 1 or config.guidance_mode != "constant"):
        raise UsageError(
            "evaluation.solver: dopri5 chooses the steps of every sample itself. Expected one value in "
            "evaluation.steps, which only names the setting, and guidance_mode constant."
        )
    if config.solver == "sde" and min(config.steps) < 2:
        raise UsageError("evaluation.steps: the solver sde needs at least 2 steps, found 1.")
    try:
        for steps in config.steps if config.solver in DDPM_SOLVERS else ():
            ddim_steps(steps) if config.solver == "ddim" else equal_steps([steps])
    except ValueError as error:
        raise UsageError(f"evaluation.steps: {error}.") from error


def _sde(section: SDESection | None) -> SDE | None:
    """Return the settings of the solver sde; None for the defaults, however they were given."""
    return None if section is None or section == SDESection() else SDE(**section.model_dump())


@dataclass(frozen=True)
class GuidedModel:
    """The diffusion model, and the worse model that guides it, if any."""

    model: TrainedDiffusion
    guide: TrainedDiffusion | None = None

    def settings(self, config: EvaluationSection) -> list[SamplerSettings]:
        """Return all settings of the sweep.

        Raises:
            UsageError: an unknown guidance mode, one that makes no sense with a guide, or too many guided channels.
        """
        require_sampling(config, self.model.section, guided=self.guide is not None)
        require_guided_channels(config, self.model.channels)
        return [
            SamplerSettings(
                steps=steps,
                guidance=scale,
                solver=config.solver,
                guidance_mode=config.guidance_mode,
                time_shift=shift_of(config.time_shift, self.model.cells, self.model.channels),
                seed=config.seed + repeat,
                precision=config.precision,
                weights=self.model.weights_name(config.weights),
                labels=config.labels,
                guide=None if self.guide is None else self.guide.described(config.guide_weights),
                classes=self.model.classes,
                guidance_channels=config.guidance_channels,
                ddim_eta=config.ddim_eta,
                sde=_sde(config.sde),
                internal=config.internal_guidance or None,
                repeat=repeat,
            )
            for repeat in range(config.seeds or 1)
            for scale in config.guidance
            for steps in config.steps
        ]

    def require_match(self) -> None:
        """Check that both models have the same latents.

        Raises:
            MismatchError: they have not.
        """
        if self.guide is None:
            return
        ours, theirs = self.model, self.guide
        same_shape = all(
            getattr(ours, name) == getattr(theirs, name) for name in ("grid", "channels", "class_names", "objective")
        )
        pairs = zip(ours.statistics(), theirs.statistics(), strict=True)
        if not same_shape or not all(np.array_equal(a, b) for a, b in pairs):
            raise MismatchError(
                f"--guide {theirs.directory}: expected a model of the same latents as {ours.directory}, found one of "
                f"another {'cache' if same_shape else 'shape, objective or other classes'}. Train both on one cache."
            )

    def guide_input(self, config: EvaluationSection) -> dict[str, InputRef]:
        """Return the additional inputs of an evaluation with a guide."""
        guide = self.guide
        if guide is None:
            return {}
        about = {"weights": guide.weights_name(config.guide_weights), "step": guide.step, "made_from": guide.made_from}
        sha256 = guide.weights_sha256(config.guide_weights)
        return {"guide": InputRef(kind="diffusion", fingerprint=sha256, path=str(guide.directory), config=about)}

    def absolute(self) -> GuidedModel:
        """Return the same with absolute paths, for processes with another current directory."""
        return GuidedModel(self.model.absolute(), None if self.guide is None else self.guide.absolute())
