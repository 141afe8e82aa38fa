"""Recipe: the learning rate over steps, of the autoencoder and of the diffusion model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .section import Natural, Section


class ScheduleSection(Section):
    """Learning rate over steps."""

    warmup_steps: Natural = Field(0, description="Steps of linear warm-up.")
    kind: Literal["constant", "cosine"] = Field("constant", description="constant or cosine.")
    final_factor: float = Field(0.0, ge=0, le=1, description="cosine: final learning rate / learning_rate.")
