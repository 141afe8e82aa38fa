"""`svgpipe verify`: check that an artifact is complete and matches its manifest.

By default it checks manifests, sizes, hashes of small files and completeness. With `deep` it reads every byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from svgpipe.manifests.alignment import ALIGNMENT_NAME, MeasuredAlignment
from svgpipe.manifests.checkpoint import load_tensors
from svgpipe.manifests.errors import ArtifactError, MismatchError
from svgpipe.manifests.evaluation import EvaluationManifest
from svgpipe.manifests.filesystem import Location, file_sha256, file_size, has_sha256, location
from svgpipe.manifests.index import read_index, refs_of_table
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.kinds import read_any
from svgpipe.manifests.label_maps import LabelMaps, LabelMapsManifest
from svgpipe.manifests.manifest import MANIFEST_NAME, digest, read_json
from svgpipe.manifests.model_manifests import AUTOENCODER_FILE, BACKBONE_FILE, AutoencoderManifest, DiffusionManifest
from svgpipe.manifests.power_averages import RECONSTRUCTED_NAME, MadeAverages
from svgpipe.manifests.reconstruction import ReconstructionManifest
from svgpipe.manifests.report_file import REPORT_NAME
from svgpipe.manifests.shards import ShardSetManifest, changed_content, index_of, tar_of

from ..runtime.progress import Progress, Silent
from .verify_cache import Finding, finding, found_by, verify_cache


def verify(path: Location, *, deep: bool = False, progress: Progress | None = None) -> list[Finding]:
    """Return all problems of the artifact at `path`; an empty list if there are none.

    Raises:
        ArtifactError: there is no artifact.
    """
    progress = progress or Silent()
    if not path.exists():
        raise ArtifactError(f"{path}: expected an artifact, found no such directory.")
    if not (path / MANIFEST_NAME).exists():
        plan = read_json(path / "plan.json")
        if plan.get("kind") == "feature-cache":
            return list(verify_cache(path, None, deep=deep, progress=progress))
        return [Finding(str(path), "unfinished; run the command that makes it again")]
    try:
        manifest = read_any(path)
    except ArtifactError as error:
        return [Finding(str(path / MANIFEST_NAME), str(error))]
    return list(_CHECKS[manifest.kind](path, manifest, deep=deep, progress=progress))


Findings = Iterator[Finding]


def _verify_shards(path: Location, manifest: Any, *, deep: bool, progress: Progress) -> Findings:
    assert isinstance(manifest, ShardSetManifest)
    if manifest.content != ShardSetManifest.content_of(manifest.shards):
        yield finding(path / MANIFEST_NAME, "the list of tars is not the one that was published")
    progress.begin("verify", len(manifest.shards), "tars")
    for shard in manifest.shards:
        tar, index = tar_of(path, shard), index_of(path, shard)
        size = file_size(tar)
        if size != shard.num_bytes:
            yield finding(tar, f"expected {shard.num_bytes} bytes, found {'no file' if size is None else size}")
        elif not deep and changed_content(shard, tar) is not None:
            yield finding(tar, "was changed after it was indexed; its labels may be others now")
        try:
            table = read_index(index, shard.num_images)
        except ArtifactError as error:
            yield finding(index, error)
            progress.advance()
            continue
        if deep and (found := file_sha256(index)) != shard.index_sha256:
            yield finding(index, f"expected sha256 {shard.index_sha256[:12]}, found {found[:12]}")
        refs = refs_of_table(table, tar)
        for ref in refs:
            if ref.reject is None and not 0 <= ref.label < len(manifest.class_names):
                problem = f"{ref.key}: expected a label of 0..{len(manifest.class_names) - 1}, found {ref.label}"
                yield finding(index, problem)
        if deep and size is not None:
            if (found := file_sha256(tar)) != shard.sha256:
                yield finding(tar, f"expected sha256 {shard.sha256[:12]}, found {found[:12]}")
            for ref in refs:
                try:
                    if ref.reject is None:
                        ref.read()
                except ArtifactError as error:
                    yield finding(tar, error)
        progress.advance()


def _verify_tensors(path: Location, sha256: str, deep: bool) -> Findings:
    try:
        tensors = load_tensors(path, sha256)
    except ArtifactError as error:
        yield finding(path, error)
        return
    bad = [name for name, value in tensors.items() if deep and not bool(value.isfinite().all())]
    if bad:
        yield finding(path, f"{bad[0]}: a value is not finite")


def _verify_checkpoints(path: Location, deep: bool) -> Findings:
    """Yield problems of checkpoints. They are only read if every byte is checked.

    Returns:
        The findings.
    """
    listing = path / "checkpoints" / "latest.json"
    if not deep or not listing.exists():
        return
    try:
        for entry in read_json(listing)["checkpoints"]:
            folder = path / "checkpoints" / entry["folder"]
            for group, sha256 in entry["files"].items():
                yield from _verify_tensors(folder / f"{group}.safetensors", sha256, deep)
    except (ArtifactError, KeyError, TypeError) as error:
        yield finding(listing, error)


def _verify_autoencoder(path: Location, manifest: Any, *, deep: bool, progress: Progress) -> Findings:
    assert isinstance(manifest, AutoencoderManifest)
    progress.begin("verify", 1, "autoencoders")
    yield from _verify_tensors(path / AUTOENCODER_FILE, manifest.content, deep)
    if manifest.config["backbone"]["weights"] == "beside" or (path / BACKBONE_FILE).exists():
        yield from _verify_backbone(path, manifest, deep)
    yield from _verify_checkpoints(path, deep)
    if manifest.alignment is not None and not np.isfinite(manifest.alignment).all():
        yield finding(path / MANIFEST_NAME, "an alignment scalar is not finite")
    progress.advance()


def _verify_backbone(path: Location, manifest: AutoencoderManifest, deep: bool) -> Findings:
    """Yield problems of the backbone file and the alignment of an imported autoencoder."""
    file = path / BACKBONE_FILE
    if file_size(file) is None:
        yield finding(file, "expected the imported backbone, found no such file")
    elif deep:
        # Imported here, because other artifacts can be verified without timm.
        from ..networks.autoencoder import load_autoencoder

        try:
            load_autoencoder(path)
        except (ArtifactError, MismatchError) as error:
            yield finding(file, error)
    try:
        MeasuredAlignment.read(path)
    except ArtifactError as error:
        yield finding(path / ALIGNMENT_NAME, error)


def _verify_diffusion(path: Location, manifest: Any, *, deep: bool, progress: Progress) -> Findings:
    assert isinstance(manifest, DiffusionManifest)
    try:
        made_later = MadeAverages.read(path, manifest.fingerprint).content
    except ArtifactError as error:
        yield finding(path / RECONSTRUCTED_NAME, error)
        made_later = {}
    content = manifest.content | made_later
    progress.begin("verify", len(content), "files")
    for name, sha256 in content.items():
        yield from _verify_tensors(path / name, sha256, deep)
        progress.advance()
    yield from _verify_checkpoints(path, deep)


def _verify_evaluation(path: Location, manifest: Any, *, deep: bool, progress: Progress) -> Findings:
    assert isinstance(manifest, EvaluationManifest)
    yield from _verify_report(path, manifest.report)
    yield from _verify_latents(path, manifest, deep)
    latents = [manifest.latents[name].content for name in manifest.settings]
    yield from _verify_images(path, lambda tars: digest([latents, tars]) == manifest.content, deep, progress)


def _verify_reconstruction(path: Location, manifest: Any, *, deep: bool, progress: Progress) -> Findings:
    assert isinstance(manifest, ReconstructionManifest)
    yield from _verify_report(path, manifest.report)
    yield from _verify_images(path, lambda tars: digest(tars) == manifest.content, deep, progress)


def _verify_label_maps(path: Location, manifest: Any, *, deep: bool, progress: Progress) -> Findings:
    assert isinstance(manifest, LabelMapsManifest)
    journal, units = Journal(path), -(-manifest.num_samples // manifest.unit_rows)
    progress.begin("verify", units, "units")
    before = 0
    for unit in range(units):
        try:
            journal.check(unit, deep=deep)
        except ArtifactError as error:
            before += 1
            yield Finding(str(path), str(error))
        progress.advance()
    if before:
        return
    if LabelMapsManifest.content_of(journal, units) != manifest.content:
        yield finding(path / MANIFEST_NAME, "the list of units is not the one that was published")
    maps, entries = LabelMaps(path), [journal.read(unit) for unit in range(units)]
    for name in maps.names:
        try:
            expected = [has for entry in entries for has in entry["present"][name]]
            if maps.rows(name).tolist() != np.flatnonzero(expected).tolist():
                yield finding(path / f"has_{name}", "does not name the images that have a map")
            maps.read(name, maps.rows(name)[:1].tolist())
        except ArtifactError as error:
            yield Finding(str(path), str(error))


def _verify_report(path: Location, sha256: str) -> Findings:
    report = path / REPORT_NAME
    if not has_sha256(report, sha256):
        yield finding(report, "missing or not the one that was published")


def _verify_images(
    path: Location, published: Callable[[dict[str, list[str]]], bool], deep: bool, progress: Progress
) -> Findings:
    """Yield problems of decoded images. `published` tells whether these are the published hashes of a set's tars."""
    decode = Journal(path, "journal/decode")
    names = decode.names()
    progress.begin("verify", len(names), "tars")
    tars: dict[str, list[str]] = {}
    for name in names:
        try:
            record = decode.check(name, deep=deep).entry
            tars.setdefault(record["set"], []).append(record["shard"]["sha256"])
        except ArtifactError as error:
            yield found_by(error)
        progress.advance()
    if not published(tars):
        yield finding(decode.directory, "its records are not those that were published")


def _verify_latents(path: Location, manifest: EvaluationManifest, deep: bool) -> Findings:
    """Yield problems of latents that are still there. They are not part of the evaluation and may be deleted."""
    for ref in manifest.latents.values():
        store = _place_of(path, ref.path)
        if not (store / "zarr.json").exists():
            continue
        journal, rows, hashes = Journal(store), 0, list[str]()
        try:
            while rows < manifest.num_samples:
                record = journal.check(len(hashes), deep=deep)
                rows += record.entry["rows"]
                hashes += [file.sha256 for file in record.files]
        except ArtifactError as error:
            yield found_by(error)
            continue
        if digest(hashes) != ref.content:
            yield finding(journal.directory, "its records are not those that were published")


def _place_of(directory: Location, path: str) -> Location:
    """Return the location of a path relative to an artifact, or of a URL."""
    return location(path) if "://" in path else directory / path


_CHECKS: dict[str, Callable[..., Findings]] = {
    "shard-set": _verify_shards,
    "autoencoder": _verify_autoencoder,
    "feature-cache": verify_cache,
    "diffusion": _verify_diffusion,
    "evaluation": _verify_evaluation,
    "reconstruction": _verify_reconstruction,
    "label-maps": _verify_label_maps,
}
