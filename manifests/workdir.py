"""The output directory of a stage: begun, resumed, refused, or already finished."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Literal, Self, TypeVar

from .errors import ArtifactError, MismatchError
from .filesystem import Location, children, make_directory, remove_partials
from .lock import LOCK_NAME, Lock
from .manifest import (
    MANIFEST_NAME,
    PLAN_NAME,
    InputRef,
    Json,
    Manifest,
    canonical_json,
    differing_fields,
    digest,
    read_plan,
    write_json,
)
from .progress_file import LOG_NAME, PROGRESS_NAME, append_log

M = TypeVar("M", bound=Manifest)
WorkState = Literal["new", "begun", "finished", "extended"]  # extended: finished, and to be continued
INPUTS_DIFFER = "Inputs differ: the images, latents or artifacts were changed, or others were given."


@dataclass(frozen=True)
class StageSpec(Generic[M]):
    """What a stage is asked to make.

    Attributes:
        path: directory to create or resume.
        kind: manifest class of the artifact.
        config: exact config, JSON values only.
        inputs: input artifacts by name.
    """

    path: Location
    kind: type[M]
    config: Json
    inputs: Mapping[str, InputRef]

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", json.loads(canonical_json(self.config)))  # tuples become lists

    @property
    def plan(self) -> Json:
        """Content of plan.json."""
        fingerprints = {name: ref.fingerprint for name, ref in self.inputs.items()}
        return {"kind": self.kind.KIND, "config": self.config, "inputs": fingerprints}

    def _finished(self) -> M | None:
        """Return the manifest if the directory is finished with this config and these inputs; None without a manifest.

        Raises:
            MismatchError: it was made with another config or other inputs.
            ArtifactError: the manifest is damaged.
        """
        if not (self.path / MANIFEST_NAME).exists():
            return None
        done = self.kind.read(self.path)
        made = {"kind": done.kind, "config": done.config}
        made["inputs"] = {name: ref.fingerprint for name, ref in done.inputs.items()}
        noun = self.kind.NOUN.split(" ", 1)[1]
        self._require_equal(
            made,
            f"a finished {noun} (fingerprint {done.fingerprint[:12]}) that was made",
            "Use the same recipe and options (did you forget --recipe, --set or --source?), or give another output "
            "directory.",
            self.kind.MAY_CHANGE,
        )
        return done

    def state(self) -> tuple[WorkState, M | None]:
        """Return the state of the directory, and the manifest if nothing is left to do.

        Raises:
            MismatchError: it was begun or finished with another config or other inputs.
            ArtifactError: it is a file, or holds files that are not svgpipe's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ArtifactError(f"{self.path}: expected a directory for {self.kind.NOUN}, found a file.")
        if (done := self._finished()) is not None:
            return ("extended", None) if self._grown(done.config) else ("finished", done)
        if _holds_nothing(self.path):
            return "new", None
        if not (self.path / PLAN_NAME).exists():
            raise ArtifactError(
                f"{self.path}: expected an empty or new directory for {self.kind.NOUN}, found files that are not "
                "svgpipe's. Give another output directory."
            )
        self._require_equal(
            read_plan(self.path),
            f"{self.kind.NOUN}, half made, that was begun",
            "Use the same recipe and options, or give another output directory.",
            self.kind.MAY_CHANGE | self.kind.LATE,
        )
        return "begun", None

    def _grown(self, config: Json) -> set[str]:
        """Return the keys whose number is higher than in `config`."""
        return {key for key in self.kind.GROWS if key in config and self.config[key] > config[key]}

    def _require_equal(self, found: Json, noun: str, what_to_do: str, may_change: frozenset[str]) -> None:
        config = self.kind.upgraded(found["config"])
        allowed = may_change | self._grown(config)
        changed = {key: value for key, value in self.config.items() if key in allowed}
        there = {**with_new_keys(config, self.config), **changed}
        lines = differing_fields({**found, "config": there}, self.plan)
        if lines:
            hints = [INPUTS_DIFFER] if any(line.startswith("inputs.") for line in lines) else []
            hints += [what_to_do, *([self.kind.HINT] if self.kind.HINT else [])]
            raise MismatchError(
                f"{self.path}: holds {noun} differently "
                f"(there {digest(found)[:12]}, here {digest(self.plan)[:12]}).\n  "
                + "\n  ".join(lines)
                + f"\n{' '.join(hints)}"
            )


def with_new_keys(found: Json, expected: Json) -> Json:
    """Return a config of an older version with the keys that it lacks, as far as they are off (null or false).

    A key that is added to a recipe is therefore off by default.
    """
    added = {key: value for key, value in expected.items() if key not in found and (value is None or value is False)}
    nested = {
        key: with_new_keys(value, expected[key]) if isinstance(expected.get(key), dict) else value
        for key, value in found.items()
        if isinstance(value, dict)
    }
    return {**found, **nested, **added}


def _holds_nothing(path: Location) -> bool:
    """Return whether no work could be lost: absent, empty, or only a plan and temporary files.

    Such a plan is replaced silently, so that a refused command can be run again with better options.
    """
    if not path.exists():
        return True
    names = {entry.name for entry in children(path)} - {PLAN_NAME, LOCK_NAME, PROGRESS_NAME, LOG_NAME}
    return all(name.startswith(".") and name.endswith((".partial", ".claim")) for name in names)


class WorkDir(Generic[M]):
    """An output directory, locked while a stage works in it.

    `finished` is the manifest if the directory is already finished. Otherwise the lock is held until the end of the
    `with` block.
    """

    def __init__(self, spec: StageSpec[M]) -> None:
        """Begin or resume.

        Raises:
            MismatchError: the directory was begun or finished with another config or other inputs.
            ArtifactError: the directory holds files that are not svgpipe's.
            BusyError: another process works in it.
        """
        self._lock: Lock | None = None
        self.spec, self.path = spec, spec.path
        self._started = time.monotonic()
        self.finished: M | None = spec.state()[1]
        if self.finished is None:
            make_directory(self.path)
            self._lock = Lock(self.path)
            try:
                self._begin()
            except BaseException:
                self.close()
                raise

    def _begin(self) -> None:
        # The previous owner of the lock may have begun or finished the work.
        state, self.finished = self.spec.state()
        if self.finished is not None:
            self.close()
            return
        if state == "new" or read_plan(self.path) != self.spec.plan:
            write_json(self.path / PLAN_NAME, self.spec.plan)
        if state == "extended":  # unfinished from here on
            (self.path / MANIFEST_NAME).unlink()
        remove_partials(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if self._lock is not None and error is not None:
                append_log(self.path, f"{type(error).__name__}: {error}")
            elif self._lock is not None:
                append_log(self.path, "finished")
                (self.path / PROGRESS_NAME).unlink(missing_ok=True)
        finally:
            self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check_lock(self) -> None:
        """Check that the lock is still held.

        Raises:
            BusyError: it was lost to another process.
        """
        if self._lock is not None:
            self._lock.check()

    def completed(self, manifest: M) -> M:
        """Return the manifest with config, inputs, wall time and fingerprint."""
        seconds = round(time.monotonic() - self._started, 3)
        inputs = {name: ref.recorded_by(self.path) for name, ref in self.spec.inputs.items()}
        update = {"config": self.spec.config, "inputs": inputs, "seconds": seconds}
        return manifest.model_copy(update=update).sealed()

    def publish(self, manifest: M) -> M:
        """Write manifest.json. All files that it describes must be on disk.

        Returns:
            The manifest as written.

        Raises:
            BusyError: the lock was lost.
        """
        self.check_lock()
        remove_partials(self.path)  # of workers that were killed in this run
        return self.completed(manifest).publish(self.path)
