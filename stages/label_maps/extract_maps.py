"""`svgpipe extract-maps`: KEY.seg.png and KEY.depth.npy in the tars of a shard set → label maps of the centre crops.

A unit is one outer shard. A killed extraction resumes. A map that cannot be used is rejected; its image has none then.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.dense_section import MapsSection
from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.filesystem import Location, absolute, write_atomic
from svgpipe.manifests.index import ImageRef
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.label_maps import (
    DEPTH,
    FILLS,
    SEGMENTATION,
    LabelMapsManifest,
    MapsSpec,
    create_maps,
    write_maps,
    write_presence,
)
from svgpipe.manifests.rejects import REJECTS_NAME, Reject, reject_lines
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.workdir import StageSpec, WorkDir

from ..images.decode import RejectedImageError, upright_size
from ..runtime.processes import map_in_processes
from ..runtime.progress import Progress, Recorded
from ..runtime.resources import cpu_count
from .tar_maps import (
    EXTENSIONS,
    RejectedMapError,
    centre_labels,
    members_of,
    read_map,
    require_labels,
    require_same_shape,
)

NAMED_REJECTS = 5


def extract_maps(
    shards: ShardSet,
    out: Location,
    config: MapsSection,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
) -> LabelMapsManifest:
    """Write the label maps of a shard set at `out`; run again to resume.

    Args:
        shards: shard set, whose tars hold the maps beside the images.
        out: directory to create or resume.
        config: section `maps` of a recipe.
        processes: number of processes; None: one per core.
        progress: receives the progress.

    Returns:
        The manifest of the label maps.

    Raises:
        UsageError: the config names neither classes nor a unit of depth.
        MismatchError: `out` was begun with other shards or another config.
        ArtifactError: a tar is missing or changed, or there is no usable map.
    """
    names = _names(config)
    stage = StageSpec(out, LabelMapsManifest, config.model_dump(mode="json"), {"shards": shards.as_input()})
    with WorkDir(stage) as work:
        if work.finished is not None:
            return work.finished
        progress = Recorded(progress, out)
        spec = MapsSpec(len(shards), config.size, config.unit_rows, names)
        create_maps(out, spec)
        journal = Journal(out)
        missing = journal.missing(range(spec.num_units))
        progress.begin(
            "maps", spec.num_samples, "images", spec.num_samples - sum(len(spec.rows_of(i)) for i in missing)
        )
        write = _WriteUnit(shards.absolute(), absolute(out), spec, config)
        named = 0
        for unit, rejects in zip(missing, map_in_processes(write, missing, processes or cpu_count()), strict=True):
            for reject in rejects[: max(0, NAMED_REJECTS - named)]:
                progress.say(f"rejected: {reject.tar}: {reject.key}: {reject.reason}")
            named += len(rejects)
            progress.advance(len(spec.rows_of(unit)))
        return _publish(work, spec, config, journal, progress)


def _names(config: MapsSection) -> tuple[str, ...]:
    asked = {SEGMENTATION: bool(config.classes), DEPTH: config.depth_unit is not None}
    if not any(asked.values()):
        raise UsageError(
            "maps: expected the classes of the masks (maps.classes), the unit of the depths (maps.depth_unit, 1.0 for "
            "metres), or both, found neither. Write them into a recipe: --recipe FILE."
        )
    return tuple(name for name, wanted in asked.items() if wanted)


def _publish(
    work: WorkDir[LabelMapsManifest], spec: MapsSpec, config: MapsSection, journal: Journal, progress: Progress
) -> LabelMapsManifest:
    """Write what is known only at the end, and the manifest.

    Returns:
        The manifest.

    Raises:
        ArtifactError: there is no usable map.
    """
    entries = [journal.read(unit) for unit in range(spec.num_units)]
    present = {
        name: np.asarray([has for entry in entries for has in entry["present"][name]], np.bool_) for name in spec.names
    }
    rejects = [Reject(**reject) for entry in entries for reject in entry["rejects"]]
    if not any(values.any() for values in present.values()):
        shown = rejects[0].reason if rejects else "no tar holds one"
        wanted = " or ".join(f"KEY.{EXTENSIONS[name]}" for name in spec.names)
        raise ArtifactError(f"{work.spec.inputs['shards'].path}: expected {wanted} beside the images ({shown}).")
    write_presence(work.path, present)
    write_atomic(work.path / REJECTS_NAME, reject_lines(rejects))
    counts = {name: int(values.sum()) for name, values in present.items()}
    for name, count in counts.items():
        if count < spec.num_samples:
            progress.say(
                f"{spec.num_samples - count} of {spec.num_samples} images have no usable KEY.{EXTENSIONS[name]}"
            )
    if rejects:
        progress.say(f"{len(rejects)} maps are rejected, see {work.path / REJECTS_NAME}")
    return work.publish(
        LabelMapsManifest(
            num_samples=spec.num_samples,
            size=spec.size,
            unit_rows=spec.unit_rows,
            classes=list(config.classes),
            max_depth=None if config.depth_unit is None else config.max_depth,
            num_segmentation=counts.get(SEGMENTATION, 0),
            num_depth=counts.get(DEPTH, 0),
            num_rejected=len(rejects),
            content=LabelMapsManifest.content_of(journal, spec.num_units),
        )
    )


@dataclass(frozen=True)
class _WriteUnit:
    """Reads the maps of one unit, and writes its outer shards and its journal record."""

    shards: ShardSet
    out: Location
    spec: MapsSpec
    config: MapsSection

    def __call__(self, unit: int) -> list[Reject]:
        """Return the rejected maps."""
        rows, size = self.spec.rows_of(unit), self.spec.size
        maps: dict[str, NDArray[Any]] = {
            name: np.full((len(rows), size, size), FILLS[name][1], FILLS[name][0]) for name in self.spec.names
        }
        present = {name: [False] * len(rows) for name in self.spec.names}
        rejects = []
        for i, ref in enumerate(self.shards.refs(rows)):
            for name in self.spec.names:
                try:
                    found = None if ref.reject is not None else self._map(ref, name)
                except (RejectedMapError, RejectedImageError) as error:
                    reason = f"KEY.{EXTENSIONS[name]}: {error}"
                    rejects.append(Reject(rows[i], str(ref.tar), ref.offset, ref.key, reason))
                    continue
                if found is not None:
                    maps[name][i], present[name][i] = found, True
        files = write_maps(self.out, self.spec, unit, maps)
        entry = {"present": present, "rejects": [asdict(reject) for reject in rejects]}
        Journal(self.out).record(unit, entry, dict.fromkeys(files))
        return rejects

    def _map(self, ref: ImageRef, name: str) -> NDArray[Any] | None:
        """Return the map of an image; None: it has none."""
        member = members_of(ref.tar).get((ref.key, name))
        if member is None:
            return None
        labels = read_map(ref.tar, member, name, self.config)
        require_same_shape(labels, upright_size(ref.read()))
        cropped = centre_labels(labels, self.spec.size)
        require_labels(cropped, name, self.config)
        return cropped
