"""`svgpipe repair`: make the damaged units of a cache again, up to the published content.

During the repair, the manifest is moved aside, so that nobody reads the cache. The same command resumes a killed
repair.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.alignment import require_same_alignment
from svgpipe.manifests.cache_manifest import CacheManifest
from svgpipe.manifests.calibration import Calibration
from svgpipe.manifests.errors import ArtifactError, MismatchError
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.filesystem import Location, sync_directory
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.lock import locked
from svgpipe.manifests.manifest import MANIFEST_NAME, PLAN_NAME, InputRef, require_same, write_json
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.recipe import ExtractSection
from svgpipe.manifests.shards import ShardSet

from ..extract.stage import extract
from ..import_latents.stage import Import, import_latents, require_readable
from ..runtime.progress import Progress, Silent
from ..runtime.runner import Runner
from .requantize import requantize
from .verify import verify
from .verify_cache import Finding

ASIDE_NAME = "manifest.before-repair.json"


def repair(
    path: Location,
    *,
    shards: ShardSet | None = None,
    autoencoder: Location | None = None,
    runner: Runner | None = None,
    progress: Progress | None = None,
) -> list[Finding]:
    """Repair the cache at `path`.

    Args:
        path: finished cache.
        shards: its shard set, if it was moved.
        autoencoder: its autoencoder, if it was moved.
        runner: where units run; default: in this process.
        progress: receives the progress.

    Returns:
        The problems that were found and repaired.

    Raises:
        MismatchError: other inputs than the cache's, or the repaired cache has another content.
        ArtifactError: the manifest is damaged, or an input is missing.
        BusyError: another process works in the cache.
    """
    progress = progress or Silent()
    aside = path / ASIDE_NAME
    # It exists next to a manifest if a repair was killed before its first change or after its last one.
    begun = aside.exists()
    resumed = begun and not (path / MANIFEST_NAME).exists()
    before = CacheManifest.parse(aside if begun else path / MANIFEST_NAME)
    findings = [] if resumed else verify(path, deep=True, progress=progress)
    if not resumed and not findings:
        _compare(path, before)
        return []
    damaged = {finding.unit for finding in findings if finding.unit is not None}
    again = _maker(path, before, damaged, shards, autoencoder, runner, progress)
    if not resumed:
        with locked(path):
            _take_apart(path, before, damaged)
    again(path)
    _compare(path, before)
    return findings


def _compare(path: Location, before: CacheManifest) -> None:
    """Check that the repaired cache has the published content, and restore the published manifest.

    The manifest keeps the seconds and timings of the extraction.

    Raises:
        MismatchError: it has another content.
    """
    after = CacheManifest.read(path)
    if after.fingerprint == before.fingerprint and after != before:
        write_json(path / MANIFEST_NAME, before.model_dump(mode="json"))
    (path / ASIDE_NAME).unlink(missing_ok=True)
    if after.content != before.content:
        raise MismatchError(
            f"{path}: is complete again, but its content is {after.content[:12]}, not {before.content[:12]}: the new "
            "units differ in their last bits, as with other hardware or library versions. Artifacts made from the "
            "cache name the old content; if that matters, extract the whole cache again."
        )


def _take_apart(path: Location, manifest: CacheManifest, damaged: set[int]) -> None:
    """Turn a finished cache into an unfinished one without the damaged units.

    The order matters: after a kill at any moment, the cache is either finished and reported as damaged by verify, or
    unfinished with a journal that names no damaged unit.
    """
    _restore_calibration(path, manifest)
    plan = {
        "kind": manifest.kind,
        "config": manifest.config,
        "inputs": {name: ref.fingerprint for name, ref in manifest.inputs.items()},
    }
    write_json(path / PLAN_NAME, plan)
    write_json(path / ASIDE_NAME, manifest.model_dump(mode="json"))
    journal = Journal(path)
    for unit in sorted(damaged):
        journal.forget(unit)
    if isinstance(path, Path):
        sync_directory(path / "journal")
    (path / MANIFEST_NAME).unlink()


def _restore_calibration(path: Location, manifest: CacheManifest) -> None:
    """Restore the calibration in the journal from the arrays, or the arrays from the journal.

    Raises:
        ArtifactError: neither can be read.
    """
    try:
        store = FeatureStore(path, manifest.spec)
        mean, std = store.array("channel_mean"), store.array("channel_std")
        calibration = Calibration(mean, std, store.feature_scale)
    except ArtifactError:
        calibration = Calibration.read(Journal(path))
    calibration.record(Journal(path))


def _require_images(path: Location, manifest: CacheManifest, damaged: set[int], shards: ShardSet) -> None:
    """Check that all usable images of the damaged units still have the indexed bytes.

    Extraction rejects an altered image. A repair would then replace its row, which may be good, by zeros.

    Raises:
        ArtifactError: an image was altered.
    """
    for ref in shards.refs(_valid_rows(path, manifest, damaged, ~shards.rows.rejected)):
        ref.read()


def _valid_rows(path: Location, manifest: CacheManifest, damaged: set[int], otherwise: NDArray[np.bool_]) -> list[int]:
    """Return the valid rows of the damaged units; `otherwise` (samples,) is used if the array of the cache is lost."""
    try:
        valid = FeatureStore(path, manifest.spec).array("valid")
    except ArtifactError:
        valid = otherwise
    return [row for unit in sorted(damaged) for row in manifest.spec.rows_of(unit) if valid[row]]


def _maker(
    path: Location,
    manifest: CacheManifest,
    damaged: set[int],
    shards: ShardSet | None,
    autoencoder: Location | None,
    runner: Runner | None,
    progress: Progress,
) -> Callable[[Location], CacheManifest]:
    """Return the stage that made the cache. Inputs are opened and checked before anything is changed.

    Raises:
        ArtifactError: an input is missing.
        MismatchError: an input is another one.
    """

    def require(name: str, ref: InputRef) -> None:
        what = "Repair needs the same inputs as the extraction."
        require_same("the cache", manifest.inputs[name], ref, what_to_do=what)

    if "cache" in manifest.inputs:
        source = manifest.inputs["cache"].place(path)
        require("cache", CacheManifest.read(source).as_input(source))
        return lambda path: requantize(source, path, manifest.store_dtype, progress=progress)
    if "latents" in manifest.inputs:
        wanted = Import.of_cache(manifest, path)
        for name, ref in wanted.spec(wanted.files(), path).inputs.items():
            require(name, ref)
        require_readable(wanted, _valid_rows(path, manifest, damaged, np.ones(manifest.num_samples, bool)))
        return lambda path: import_latents(wanted, path, max_rejects=1.0, progress=progress)
    try:
        opened = shards or ShardSet.of_input(manifest.input("shards"), path)
        encoder = autoencoder or manifest.input("autoencoder").place(path)
        trained = AutoencoderManifest.read(encoder)
    except ArtifactError as error:
        raise ArtifactError(f"{error} If it was moved, give --shards or --autoencoder.") from error
    require("shards", opened.as_input())
    require("autoencoder", trained.as_input(encoder))
    require_same_alignment(encoder, path)
    config = ExtractSection.model_validate(manifest.config)
    _require_images(path, manifest, damaged, opened)
    # The rejects of the finished cache were accepted when it was made.
    return lambda path: extract(opened, encoder, path, config, max_rejects=1.0, runner=runner, progress=progress)
