"""The manifest of an artifact: `manifest.json`, the last file that a stage writes.

A directory has one of three states:

    (absent)                      nothing there
    plan.json                     begun: the config and the inputs
    plan.json + manifest.json     finished

lock.json names the process that works in the directory. A directory without a manifest is unfinished: it is resumed or
refused, never read. The fingerprint of a manifest is the sha256 over its identity: kind, schema, config, fingerprints
of the inputs, and content. Times and versions are recorded outside the identity.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ArtifactError, MismatchError
from .filesystem import Location, location, write_atomic

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"

Json = dict[str, Any]


def svgpipe_version() -> str:
    """Return the version of the installed svgpipe, or 'unknown' in a bare checkout."""
    try:
        return metadata.version("svgpipe-diffusion")
    except metadata.PackageNotFoundError:
        return "unknown"


def canonical_json(value: object) -> bytes:
    """Return bytes that are equal exactly if two JSON values are equal: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: object) -> str:
    """Return the sha256 (hex) over the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def write_json(path: Location, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Location) -> Json:
    """Return the JSON object in a file.

    Raises:
        ArtifactError: the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: expected a file, found none.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: expected JSON, found something else ({error}).") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def differing_fields(expected: object, found: object, prefix: str = "") -> list[str]:
    """Return one line per leaf where two JSON values differ: dotted name and both values, sorted."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        lines: list[str] = []
        for key in sorted(set(expected) | set(found)):
            name = f"{prefix}.{key}" if prefix else str(key)
            if key in expected and key in found:
                lines += differing_fields(expected[key], found[key], name)
            else:
                there, here = (_shorten(side[key]) if key in side else "absent" for side in (expected, found))
                lines.append(f"{name}: {there} there, {here} here")
        return lines
    if expected == found:
        return []
    return [f"{prefix}: {_shorten(expected)} there, {_shorten(found)} here"]


def _shorten(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]  # a fingerprint
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


class FrozenModel(BaseModel):
    """Base of everything that is written as JSON: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class InputRef(FrozenModel):
    """Reference to an input artifact, with enough content to compare it and to show differences."""

    kind: str
    fingerprint: str
    path: str = Field(description="Location at that time; not part of any identity.")
    relative: str | None = Field(None, description="The same, relative to the artifact that records it; null: remote.")
    config: Json
    inputs: dict[str, InputRef] = Field(default_factory=dict, description="Inputs of the input: the lineage.")

    def recorded_by(self, artifact: Location) -> InputRef:
        """Return the reference as the manifest of an artifact records it: absolute, and relative to the artifact."""
        if not self.path or "://" in self.path or not isinstance(artifact, Path):
            return self
        there = Path(self.path).absolute()
        return self.model_copy(update={"path": str(there), "relative": os.path.relpath(there, artifact.absolute())})

    def place(self, artifact: Location) -> Location:
        """Return where the input of an artifact lies: beside it, if both were moved together, or at its old place."""
        if self.relative is not None and isinstance(artifact, Path):
            beside = Path(os.path.normpath(artifact.absolute() / self.relative))
            if beside.exists():
                return beside
        return location(self.path)

    def identity(self) -> Json:
        """Return what two references are compared by."""
        inputs = {name: {"fingerprint": ref.fingerprint, **ref.identity()} for name, ref in self.inputs.items()}
        return {"config": self.config, "inputs": inputs}


class Manifest(FrozenModel):
    """Fields that all manifests share.

    Subclasses set `KIND` and `NOUN`. `OUTSIDE_IDENTITY` lists fields in which two equal artifacts may differ, such as
    times and per-file lists that a content digest covers. `MAY_CHANGE` lists config keys that a later run may
    change, `LATE` those that it may change until the artifact is finished, and `GROWS` those whose number it may raise:
    it continues the finished artifact.
    """

    KIND: ClassVar[str]
    NOUN: ClassVar[str]  # with its article, for messages: "a shard set"
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = frozenset()
    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset()  # config keys that do not change the result
    LATE: ClassVar[frozenset[str]] = frozenset()  # config keys that only the last step of a stage reads
    GROWS: ClassVar[frozenset[str]] = frozenset()  # config keys whose number a later run may raise
    # Fields that older manifests do not have. At its default, such a field is not part of the identity.
    ADDED: ClassVar[frozenset[str]] = frozenset()
    HINT: ClassVar[str] = ""  # what to do instead of changing a finished artifact
    _SHARED_OUTSIDE: ClassVar[frozenset[str]] = frozenset(
        {"svgpipe_version", "finished_at", "seconds", "inputs", "fingerprint"}
    )

    kind: str
    schema_version: int = SCHEMA_VERSION
    svgpipe_version: str = Field(default_factory=svgpipe_version)
    finished_at: str = Field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    seconds: float = Field(0.0, ge=0, description="Wall time of the run that finished it.")
    config: Json = Field(default_factory=dict)
    inputs: dict[str, InputRef] = Field(default_factory=dict)
    fingerprint: str = ""

    @classmethod
    def upgraded(cls, config: Json) -> Json:
        """Return the config of an older version in today's keys."""
        return config

    def identity(self) -> Json:
        """Return the content of the fingerprint."""
        unset = {name for name in self.ADDED if getattr(self, name) == type(self).model_fields[name].default}
        fields = self.model_dump(mode="json", exclude={*self._SHARED_OUTSIDE, *self.OUTSIDE_IDENTITY, *unset})
        fields["inputs"] = {name: ref.fingerprint for name, ref in self.inputs.items()}
        return fields

    def input(self, name: str) -> InputRef:
        """Return the reference to an input.

        Raises:
            ArtifactError: none was recorded.
        """
        if name not in self.inputs:
            raise ArtifactError(f"{self.NOUN} that records no {name}, because its content was computed elsewhere.")
        return self.inputs[name]

    def sealed(self) -> Self:
        """Return the same manifest with its fingerprint."""
        return self.model_copy(update={"fingerprint": digest(self.identity())})

    def as_input(self, path: Location) -> InputRef:
        """Return the reference to this artifact for the manifest of a later stage."""
        return InputRef(
            kind=self.kind, fingerprint=self.fingerprint, path=str(path), config=self.config, inputs=self.inputs
        )

    def publish(self, directory: Location) -> Self:
        """Write `manifest.json` with the fingerprint. All files that it describes must be on disk.

        Returns:
            The manifest as written.
        """
        manifest = self.sealed()
        write_json(directory / MANIFEST_NAME, manifest.model_dump(mode="json"))
        return manifest

    @classmethod
    def read(cls, directory: Location) -> Self:
        """Return the manifest of a finished directory.

        Raises:
            ArtifactError: no manifest, another kind, a newer schema, or a fingerprint that does not match the content.
        """
        path = directory / MANIFEST_NAME
        if not path.exists():
            raise ArtifactError(_why_no_manifest(directory, cls.NOUN))
        return cls.parse(path)

    @classmethod
    def parse(cls, path: Location) -> Self:
        """Return the manifest in a file. Raises the errors of `read`.

        Raises:
            ArtifactError: see `read`.
        """
        raw = read_json(path)
        schema = raw.get("schema_version")
        if isinstance(schema, int) and schema > SCHEMA_VERSION:
            raise ArtifactError(
                f"{path}: expected manifest schema {SCHEMA_VERSION} or older, found {schema}, "
                f"written by svgpipe {raw.get('svgpipe_version')}. Upgrade svgpipe to read it."
            )
        if raw.get("kind") != cls.KIND:
            raise ArtifactError(f"{path}: expected {cls.NOUN} ({cls.KIND}), found {raw.get('kind')!r}.")
        try:
            manifest = cls.model_validate(raw)
        except ValidationError as error:
            raise ArtifactError(f"{path}: not a valid {cls.KIND} manifest: {summarise(error)}") from error
        expected = digest(manifest.identity())
        if manifest.fingerprint != expected:
            raise ArtifactError(
                f"{path}: was altered after it was written: expected fingerprint {expected[:12]}, "
                f"found {manifest.fingerprint[:12]}. Restore it or make the artifact again."
            )
        return manifest


def summarise(error: ValidationError) -> str:
    """Return the problems of a pydantic error in one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def read_plan(directory: Location) -> Json:
    """Return the content of `plan.json`: kind, config and inputs (fingerprints by name).

    Raises:
        ArtifactError: the plan is missing or damaged.
    """
    path = directory / PLAN_NAME
    plan = read_json(path)
    if not (isinstance(plan.get("kind"), str) and all(isinstance(plan.get(key), dict) for key in ("config", "inputs"))):
        raise ArtifactError(f"{path}: expected kind, config and inputs of what was begun, found {list(plan)}.")
    return plan


def _why_no_manifest(directory: Location, noun: str) -> str:
    if not directory.exists():
        return f"{directory}: expected {noun}, found no such directory."
    if (directory / PLAN_NAME).exists():
        return (
            f"{directory}: expected {noun}, found one that was begun and not finished "
            f"(no {MANIFEST_NAME}). Run the command that makes it again; it resumes."
        )
    return f"{directory}: expected {noun}, found no {MANIFEST_NAME} in it."


def require_same(where: str, expected: InputRef, found: InputRef, *, what_to_do: str) -> None:
    """Check that two references are to the same artifact.

    Raises:
        MismatchError: they differ. The message has both fingerprints and the differing fields.
    """
    if expected.fingerprint == found.fingerprint:
        return
    lines = differing_fields(expected.identity(), found.identity())
    detail = "\n  ".join(lines) if lines else "same config and inputs, other content (another run)"
    raise MismatchError(
        f"{where}: was made with {expected.kind} {expected.fingerprint[:12]} ({expected.path}), but got "
        f"{found.fingerprint[:12]} ({found.path}). They differ in:\n  {detail}\n{what_to_do}"
    )
