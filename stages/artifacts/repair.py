"""`svgpipe repair`: extract again exactly what `verify` names, and end in the content that was published.

The manifest is put aside while the cache is not whole, so that nobody reads it; a repair that was killed is taken
up by the same command.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from svgpipe.manifests.alignment import require_same_alignment
from svgpipe.manifests.cache import CacheManifest
from svgpipe.manifests.calibration import Calibration
from svgpipe.manifests.checkpoint import AutoencoderManifest
from svgpipe.manifests.errors import ArtifactError, MismatchError
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.filesystem import Location, location, sync_directory
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.lock import locked
from svgpipe.manifests.manifest import MANIFEST_NAME, PLAN_NAME, InputRef, require_same, write_json
from svgpipe.manifests.recipe import ExtractSection
from svgpipe.manifests.shards import ShardSet

from ..extract.stage import extract
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
    """Mend the cache at `path`; returns what was wrong with it.

    Args:
        shards, autoencoder: where the cache's inputs lie now, if not where they lay.
    Raises:
        MismatchError: other inputs than the cache was made from, or the mended cache has another content.
        ArtifactError: the manifest itself is damaged, or an input cannot be found.
        BusyError: another process works in the cache.
    """
    progress = progress or Silent()
    aside = path / ASIDE_NAME
    # Beside a manifest it lies when a repair was killed before it took the cache apart, or after all was mended.
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
    """The last step: the cache at `path`, whole now, has the content that was published before.

    Then its manifest becomes again the one that was published, with the seconds and timings of the extraction.

    Raises:
        MismatchError: it has another content.
    """
    after = CacheManifest.read(path)
    if after.fingerprint == before.fingerprint and after != before:
        write_json(path / MANIFEST_NAME, before.model_dump(mode="json"))
    (path / ASIDE_NAME).unlink(missing_ok=True)
    if after.content != before.content:
        raise MismatchError(
            f"{path}: is whole again, but its content is {after.content[:12]}, not {before.content[:12]}: the units "
            "made again differ in their last bits, as other hardware or library versions give. What was trained on "
            "the cache before names the old content; make the whole cache anew where that matters."
        )


def _take_apart(path: Location, manifest: CacheManifest, damaged: set[int]) -> None:
    """Make a finished cache an unfinished one that lacks the damaged units.

    In this order, so that a kill at any moment leaves either a cache that verify finds wanting or an unfinished one
    whose journal names nothing damaged.
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
    """The journal and the arrays hold the same numbers: one is made from the other where it is damaged.

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
    """Raise ArtifactError unless every image of the damaged units that was usable still has the indexed bytes.

    Extraction calls an altered image a reject: a repair would replace its row, which may be a good one, by zeros.
    """
    try:
        valid = FeatureStore(path, manifest.spec).array("valid")
    except ArtifactError:
        valid = ~shards.rows.rejected
    for unit in sorted(damaged):
        rows = [row for row in manifest.spec.rows_of(unit) if valid[row]]
        for ref in shards.refs(rows):
            ref.read()


def _maker(
    path: Location,
    manifest: CacheManifest,
    damaged: set[int],
    shards: ShardSet | None,
    autoencoder: Location | None,
    runner: Runner | None,
    progress: Progress,
) -> Callable[[Location], CacheManifest]:
    """The stage that made a cache, with its inputs opened and checked before anything is taken apart."""

    def require(name: str, ref: InputRef) -> None:
        what = "Repair needs the very inputs that the cache was made from."
        require_same("the cache", manifest.inputs[name], ref, what_to_do=what)

    if "cache" in manifest.inputs:
        source = location(manifest.inputs["cache"].path)
        require("cache", CacheManifest.read(source).as_input(source))
        return lambda path: requantize(source, path, manifest.store_dtype, progress=progress)
    try:
        opened = shards or ShardSet.of_input(manifest.inputs["shards"])
        encoder = autoencoder or location(manifest.inputs["autoencoder"].path)
        trained = AutoencoderManifest.read(encoder)
    except ArtifactError as error:
        raise ArtifactError(f"{error} If it lies elsewhere now, give --shards or --autoencoder.") from error
    require("shards", opened.as_input())
    require("autoencoder", trained.as_input(encoder))
    require_same_alignment(encoder, path)
    config = ExtractSection.model_validate(manifest.config)
    _require_images(path, manifest, damaged, opened)
    # Rejects that the finished cache already had were accepted when it was made.
    return lambda path: extract(opened, encoder, path, config, max_rejects=1.0, runner=runner, progress=progress)
