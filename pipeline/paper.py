"""What the paper reports, to stand beside one's own numbers (arXiv 2510.15301; ImageNet 256, FID of 50,000 samples)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """FID of three models under one setting; None where the paper gives none."""

    setting: str
    guided: bool
    svg: float
    sd_vae: float | None = None  # SiT-XL
    va_vae: float | None = None  # SiT-XL


PAPER_ROWS = (
    PaperRow("5 steps", False, 12.26, 69.38, 74.46),
    PaperRow("5 steps", True, 9.03, 29.48, 35.94),
    PaperRow("10 steps", False, 9.39, 32.81),
    PaperRow("10 steps", True, 6.49, 10.26),
    PaperRow("25 steps, 80 epochs", False, 6.57, 22.58, 7.29),
    PaperRow("25 steps, 80 epochs", True, 3.54, 6.06, 4.13),
    PaperRow("500 epochs", False, 3.94),
    PaperRow("500 epochs", True, 2.10),
    PaperRow("1400 epochs", False, 3.36),
    PaperRow("1400 epochs", True, 1.92),
)


@dataclass(frozen=True)
class PaperProbe:
    """Top-1 accuracy of a linear probe on ImageNet, %."""

    features: str
    top1: float


PAPER_PROBES = (PaperProbe("raw DINOv3", 86.4), PaperProbe("SVG", 85.2))
