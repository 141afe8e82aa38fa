"""Decoded tars that other evaluations find: one of the same latents by another extractor, say, decodes nothing.

    POOL/decoded/KEY.tar, KEY.parquet, KEY.json    hard links to an evaluation's files; the tar's record, written last

The key is a digest of all that decides the tar's bytes. Links take no room, and either name may be deleted; where files
cannot be linked (other disks, object stores) nothing is shared.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.manifest import read_json, write_json
from svgpipe.manifests.shards import ShardFile
from svgpipe.manifests.storage import Location, has_sha256, make_directory


@dataclass(frozen=True)
class SharedImages:
    """The folder where tars are found."""

    folder: Location

    def take(self, key: str, target: Location) -> ShardFile | None:
        """Link the tar of that key, and its index, to `target`; None where there is none that is whole."""
        record, tar = self.folder / f"{key}.json", self.folder / f"{key}.tar"
        if not record.exists():
            return None
        try:
            shard = ShardFile.model_validate(read_json(record))
        except (ArtifactError, ValidationError):
            return None
        index = tar.with_suffix(".parquet")
        if not (has_sha256(tar, shard.sha256) and has_sha256(index, shard.index_sha256)):
            return None
        if not (_link(index, target.with_suffix(".parquet")) and _link(tar, target)):
            return None
        return shard.model_copy(update={"name": target.name})

    def give(self, key: str, tar: Location, shard: ShardFile) -> None:
        """Let others find a tar that is whole."""
        make_directory(self.folder)
        place = self.folder / f"{key}.tar"
        if _link(tar.with_suffix(".parquet"), place.with_suffix(".parquet")) and _link(tar, place):
            write_json(self.folder / f"{key}.json", shard.model_dump(mode="json"))


def _link(source: Location, target: Location) -> bool:
    """Whether `target` is now another name of the file; what was there under it is replaced."""
    if not (isinstance(source, Path) and isinstance(target, Path)):
        return False
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        os.link(source, partial)
        partial.replace(target)
    except OSError:
        return False
    finally:
        partial.unlink(missing_ok=True)  # renaming one name of a file to another of it leaves both
    return True
