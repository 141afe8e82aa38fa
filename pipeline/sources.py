"""Where the images of a run come from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.recipe import Recipe

if TYPE_CHECKING:
    from svgpipe.stages.shard.scan import ImageSources

DEMO_SOURCE = "demo-photographs"


def source_folder(source: str | None, workdir: Location) -> Path:
    """Return the place of the images. The folder of the demo may not exist yet.

    Raises:
        UsageError: no place is given, or the demo runs in an object store.
    """
    if source is None:
        raise UsageError("no images: give a folder or archive with --source, or as `source:` in the recipe.")
    if source != DEMO_SOURCE:
        return local_path(source)
    if not isinstance(workdir, Path):
        raise UsageError(f"{workdir}: the demo writes its photographs to the working directory; give a folder.")
    return workdir / "photographs"


def local_path(text: str) -> Path:
    """Return a path of the command line. Python would read an empty text, of an unset shell variable, as this folder.

    Raises:
        UsageError: the text is empty.
    """
    if not text.strip():
        raise UsageError("expected a folder or archive of images, found an empty text. Is a shell variable not set?")
    return Path(text)


def image_sources(recipe: Recipe, train: Path) -> ImageSources:
    """Return the images in `train`, and the held-out ones of the recipe."""
    from svgpipe.stages.shard.scan import ImageSources

    heldout, labels = recipe.heldout, recipe.heldout_labels
    return ImageSources(
        train,
        None if heldout is None else local_path(heldout),
        None if labels is None else Path(labels),
        recipe.unlabelled,
    )
