"""Checkpoints: the training state of a run, and the finished weights of both models.

    checkpoints/latest.json             list of the checkpoints, oldest first, with the hash of every file
    checkpoints/step-00001000/*.safetensors
    autoencoder.safetensors             trained part of the autoencoder (residual, alignment, mask token, decoder)
    backbone.safetensors                frozen part, if it was imported or read from a file
    ema-0.9999.safetensors, …           diffusion transformer, one file per EMA decay
    raw.safetensors                     diffusion transformer without EMA
    statistics.safetensors              channel_mean, channel_std of the cache it was trained on

Nothing is unpickled. A checkpoint is published by one rename of latest.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from .errors import ArtifactError, storage_error
from .filesystem import Location, children, file_sha256, make_directory, remove_tree, staged
from .manifest import Json, read_json, write_json


def save_tensors(path: Location, tensors: Mapping[str, Tensor]) -> str:
    """Write safetensors atomically.

    Returns:
        sha256 of the file.
    """  # noqa: DOC501 - storage_error is a function
    try:
        with staged(path) as partial:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt"})
            sha256 = file_sha256(partial)
    except (safetensors.SafetensorError, OSError) as error:
        raise storage_error(path, error) from error
    return sha256


def load_tensors(path: Location, sha256: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU.

    Raises:
        ArtifactError: the file is missing, unreadable, or does not have this sha256.
    """
    if not path.exists():
        raise ArtifactError(f"{path}: expected weights, found no such file.")
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        raise ArtifactError(
            f"{path}: expected sha256 {sha256[:12]}, found {found[:12]}: truncated or altered. "
            "Restore the file or train again."
        )
    try:
        return load_file(path) if isinstance(path, Path) else load(path.read_bytes())
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: not a readable safetensors file: {error}") from error


@dataclass(frozen=True)
class Checkpoint:
    """One training state: step, named groups of tensors, JSON values."""

    step: int
    groups: dict[str, dict[str, Tensor]]
    values: Json


class CheckpointStore:
    """The checkpoints of one run, as listed in latest.json. File names are never used to guess the newest one."""

    def __init__(self, directory: Location, keep: int = 2, keep_every: int | None = None) -> None:
        """Keep the newest `keep` checkpoints, and permanently those at multiples of `keep_every` steps."""
        self.directory, self.keep, self.keep_every = directory, keep, keep_every

    def _listed(self) -> list[Json]:
        path = self.directory / "latest.json"
        return list(read_json(path)["checkpoints"]) if path.exists() else []

    def entry(self, folder: str | None) -> Json | None:
        """Return the entry of a checkpoint folder (default: the newest) in latest.json; None if there is none."""
        entries = [e for e in self._listed() if folder is None or e["folder"] == folder]
        return entries[-1] if entries else None

    def folders(self) -> list[Location]:
        """Return the folders of all checkpoints, the oldest first."""
        return [self.directory / entry["folder"] for entry in sorted(self._listed(), key=lambda entry: entry["step"])]

    @property
    def newest(self) -> Location | None:
        """Folder of the newest checkpoint."""
        entry = self.entry(None)
        return None if entry is None else self.directory / entry["folder"]

    def save(self, checkpoint: Checkpoint) -> Location:
        """Write and publish a checkpoint, then delete the ones that are no longer kept.

        Returns:
            Folder of the checkpoint.
        """
        name = f"step-{checkpoint.step:08d}"
        folder = self.directory / name
        remove_tree(folder)  # a partial checkpoint of a killed run
        make_directory(folder)
        hashes = {
            group: save_tensors(folder / f"{group}.safetensors", tensors)
            for group, tensors in checkpoint.groups.items()
        }
        entry = {"step": checkpoint.step, "folder": name, "files": hashes, "values": checkpoint.values}
        entries = [*(e for e in self._listed() if e["step"] < checkpoint.step), entry]
        newest = entries[-self.keep :]
        entries = [e for e in entries if e in newest or self._for_ever(e)]
        write_json(self.directory / "latest.json", {"checkpoints": entries})
        kept = {e["folder"] for e in entries}
        for old in children(self.directory):
            if old.name.startswith("step-") and old.name not in kept:
                remove_tree(old)
        return folder

    def _for_ever(self, entry: Json) -> bool:
        return self.keep_every is not None and entry["step"] % self.keep_every == 0

    def latest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """Return the newest intact checkpoint; None if there is none yet.

        A corrupt checkpoint is reported through `say`, and the previous one is loaded.

        Raises:
            ArtifactError: all listed checkpoints are corrupt.
        """
        entries = self._listed()
        problems = []
        for entry in reversed(entries):
            folder = self.directory / entry["folder"]
            try:
                groups = {
                    group: load_tensors(folder / f"{group}.safetensors", sha256)
                    for group, sha256 in entry["files"].items()
                }
            except ArtifactError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                say(f"{problem} Falling back to step {entry['step']}.")
            return Checkpoint(int(entry["step"]), groups, dict(entry["values"]))
        if problems:
            raise ArtifactError(
                f"{self.directory}: no intact checkpoint: {problems[0]} Delete the directory to restart."
            )
        return None
