"""Last step of `svgpipe shard` and `svgpipe index`: the list of rejects, then the manifest."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from svgpipe.manifests.filesystem import remove_tree, write_atomic
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.shards import ShardFile, ShardSetManifest
from svgpipe.manifests.workdir import WorkDir

from ..images.tar_names import printable


def publish_shards(
    work: WorkDir[ShardSetManifest],
    class_names: Sequence[str],
    shards: Sequence[ShardFile],
    rejects: Sequence[Mapping[str, object]],
    num_inputs: int,
) -> ShardSetManifest:
    """Write rejected.jsonl and manifest.json, and remove the journal, whose content is also in the indexes.

    Args:
        work: directory of the shard set.
        class_names: in label order.
        shards: the tars.
        rejects: one line each.
        num_inputs: usable images + rejects.

    Returns:
        The manifest as written.
    """
    lines = "".join(json.dumps(reject, sort_keys=True) + "\n" for reject in rejects)
    write_atomic(work.path / "rejected.jsonl", lines.encode())
    manifest = ShardSetManifest(
        class_names=[printable(name) for name in class_names],
        num_inputs=num_inputs,
        num_images=num_inputs - len(rejects),
        num_rejected=len(rejects),
        num_heldout=sum(shard.num_images for shard in shards if shard.split == "heldout"),
        content=ShardSetManifest.content_of(shards),
        shards=list(shards),
    )
    published = work.publish(manifest)
    remove_tree(Journal(work.path).directory)
    return published


def leaked_warning(train: Collection[str], heldout: Iterable[tuple[str, str]]) -> str | None:
    """Return a warning if held-out images have the bytes of training images; None if none has.

    Args:
        train: sha256 of the training images.
        heldout: sha256 and name of every held-out image.
    """
    shared = [name for sha256, name in heldout if sha256 in train]
    return f"warning: {len(shared)} held-out images are also training images, as {shared[0]}" if shared else None
