"""What a study checks before hours of work."""

from __future__ import annotations

import numpy as np

from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.filesystem import location
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.study import Study, Variant
from svgpipe.stages.evaluate.features import load_extractor
from svgpipe.stages.evaluate.reference import MIN_IMAGES, open_reference
from svgpipe.stages.networks.diffusion import open_diffusion

from .preflight import check_model_settings

MIN_CLASSES = 2


def check_study(study: Study, chosen: list[Variant]) -> None:
    """Check what can be known before anything is made: settings, given models, reference, weights of the extractor.

    Args:
        study: with its variants.
        chosen: variants that will be made.

    Raises:
        UsageError: settings of a variant do not fit each other.
        ArtifactError: something that is given is not there or not usable.
    """
    for variant in chosen:
        try:
            check_model_settings(variant.recipe)
            _check_given(variant)
        except (UsageError, ArtifactError) as error:
            raise type(error)(f"variant {variant.name}: {error}") from error
    if study.reference is not None:
        open_reference(study.reference, count=MIN_IMAGES)  # hashes no more images than these
    load_extractor(study.variants[0].recipe.evaluation.extractor, None)


def _check_given(variant: Variant) -> None:
    """Check the finished models that a variant uses.

    Raises:
        UsageError: the autoencoder is for images of another size, or the model has no weights of the wanted name.
        ArtifactError: there is none.
    """
    wanted = variant.recipe.autoencoder.image_size
    if variant.autoencoder is not None:
        size = AutoencoderManifest.read(location(variant.autoencoder)).image_size
        if size != wanted:
            raise UsageError(
                f"{variant.autoencoder} is for images of {size} pixels, but autoencoder.image_size is {wanted}. Images "
                "must have the same size in all variants."
            )
    if variant.diffusion is not None:
        open_diffusion(location(variant.diffusion)).weights_name(variant.recipe.evaluation.weights)


def require_measurable(shards: ShardSet) -> None:
    """Check that reconstruction and linear probe can be measured, before anything is trained.

    Raises:
        UsageError: fewer than two held-out images, or than two classes.
    """
    rows = shards.rows
    training = np.unique(rows.label[~rows.heldout & ~rows.rejected])
    heldout = len(shards.usable_rows("heldout"))
    if heldout < MIN_IMAGES:
        raise UsageError(
            f"{shards.directory}: a study measures held-out images: expected two or more, found {heldout}. Delete the "
            "shards, and set shard.holdout=0.05 or heldout=PATH for all variants."
        )
    if len(training) < MIN_CLASSES:
        raise UsageError(
            f"{shards.directory}: a study compares classes: expected training images of two or more, found "
            f"{len(training)}."
        )
