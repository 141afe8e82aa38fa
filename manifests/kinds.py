"""All kinds of artifacts, and how to open one of unknown kind."""

from __future__ import annotations

from .cache_manifest import CacheManifest
from .errors import ArtifactError
from .evaluation import EvaluationManifest
from .filesystem import Location, children
from .label_maps import LabelMapsManifest
from .manifest import MANIFEST_NAME, PLAN_NAME, Manifest, read_json
from .model_manifests import AutoencoderManifest, DiffusionManifest
from .reconstruction import ReconstructionManifest
from .shards import ShardSetManifest

KINDS: dict[str, type[Manifest]] = {
    kind.KIND: kind
    for kind in (
        ShardSetManifest,
        AutoencoderManifest,
        CacheManifest,
        DiffusionManifest,
        EvaluationManifest,
        ReconstructionManifest,
        LabelMapsManifest,
    )
}


STUDY_FOLDERS = ("tokenizers", "models")  # of a study, with a folder per tokenizer and model


def read_any(path: Location) -> Manifest:
    """Return the manifest of a finished artifact of any kind.

    Raises:
        ArtifactError: no manifest, an unknown kind, or a damaged manifest.
    """
    kind = str(read_json(path / MANIFEST_NAME).get("kind"))
    if kind not in KINDS:
        raise ArtifactError(f"{path / MANIFEST_NAME}: expected one of {', '.join(KINDS)}, found kind {kind!r}.")
    return KINDS[kind].read(path)


def artifacts_below(path: Location) -> list[Location]:
    """Return `path` if it is an artifact, finished or not; otherwise the artifacts in it, in the order of the stages.

    Of a study, these include the artifacts of its tokenizers and models.

    Raises:
        ArtifactError: there is none, or a manifest is damaged.
    """
    if not path.exists():
        raise ArtifactError(f"{path}: expected an svgpipe artifact, found no such directory.")
    of_study = [folder for name in STUDY_FOLDERS for one in _folders(path / name) for folder in _folders(one)]
    candidates = [path, *children(path), *of_study]
    artifacts = [p for p in candidates if (p / MANIFEST_NAME).exists() or (p / PLAN_NAME).exists()]
    if not artifacts:
        raise ArtifactError(f"{path}: expected an svgpipe artifact or a directory of artifacts, found neither.")
    return [path] if artifacts[0] == path else sorted(artifacts, key=_order)


def _folders(path: Location) -> list[Location]:
    return [child for child in children(path) if child.is_dir()] if path.is_dir() else []


def _order(path: Location) -> int:
    """Return the position of an artifact's stage; unknown kinds come last."""
    name = MANIFEST_NAME if (path / MANIFEST_NAME).exists() else PLAN_NAME
    kind = str(read_json(path / name).get("kind"))
    return list(KINDS).index(kind) if kind in KINDS else len(KINDS)
