"""What autoencoder training will hold in memory."""

from __future__ import annotations

import copy

import torch
from torch import nn

from svgpipe.manifests.recipe import AutoencoderSection
from svgpipe.models.autoencoder import Autoencoder
from svgpipe.models.losses import LPIPS, BackbonePerceptual, PatchDiscriminator, generator_loss

from ..runtime.device import autocast
from ..runtime.memory import resident_memory
from ..training.distributed import Team
from ..training.memory_estimate import Kept, MemoryEstimate


def estimate_autoencoder(
    config: AutoencoderSection, team: Team, model: Autoencoder, perceptual: BackbonePerceptual | LPIPS | None
) -> MemoryEstimate:
    """For one process of `team` at a step of the generator that the discriminator judges, if there is one.

    Args:
        model: as it will be trained, on the CPU and without gradients. It and `perceptual` are held already.
    """
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    section, cpu = config.discriminator, torch.device("cpu")
    count = team.largest_share(config.batch_size)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        with FakeCopyMode(mode):
            fake, judge = copy.deepcopy((model, perceptual))
        discriminator = PatchDiscriminator(width=section.width, layers=section.layers) if section.enabled else None
        parts = [part for part in (fake, judge, discriminator) if isinstance(part, nn.Module)]
        kept = Kept(weight for part in parts for weight in (*part.parameters(), *part.buffers()))
        images = torch.empty(count, 3, config.image_size, config.image_size)
        fake.train()
        with kept.hooks, autocast(cpu, config.precision):
            generator_loss(
                images,
                fake.decode(fake.encode(images, torch.empty(count))).float(),
                perceptual=judge,
                perceptual_weight=config.perceptual.weight,
                discriminator=discriminator,
                last_layer=fake.decoder.conv_out.weight,
                discriminator_weight=section.weight,
                discriminator_on=discriminator is not None,
            )
        trained = 4 * sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)
    on_cpu = team.device.type == "cpu"
    # Weights are on the CPU by now: there they are part of the process.
    weights = 0 if on_cpu else sum({id(p): p.nbytes for part in parts for p in part.parameters()}.values())
    return MemoryEstimate(
        weights=weights + trained,
        optimizer=2 * trained,
        averages=0,
        activations=kept.total + 2 * max(kept.bytes.values()),  # gradients of the largest and kernels' work space
        checkpoint=3 * trained if on_cpu and team.leads else 0,
        process=resident_memory() if on_cpu else 0,
    )
