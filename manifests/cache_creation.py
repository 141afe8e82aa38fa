"""Makes caches of features that were computed elsewhere. Needs neither torch nor images."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cache_manifest import CacheManifest
from .cache_writer import complete_store, publish_cache, write_unit
from .calibration import Calibration, given_calibration, measured_calibration, normalised, usable
from .errors import ArtifactError, UsageError
from .feature_store import FeatureStore
from .filesystem import Location, absolute, location, remove_tree
from .journal import Journal
from .manifest import MANIFEST_NAME
from .moments import Moments
from .selection import choose_evenly
from .store_spec import Distribution, StoreSpec
from .workdir import StageSpec, WorkDir

# Rows that mean and standard deviation are measured on, if they are not given.
CALIBRATION_ROWS = 4096
UNIT_ROWS = 256
STRETCH = 64
VIEWS = ("original", "flip")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Options:
    """Options of `FeatureCache.create`, see there."""

    class_names: Sequence[str] | None
    mean: ArrayLike | None
    std: ArrayLike | None
    heldout: ArrayLike | None
    distribution: Distribution
    encoder: str
    unit_rows: int

    def check(self) -> None:
        """Check the options that no array is needed for.

        Raises:
            UsageError: one is invalid.
        """
        names = self.class_names
        if isinstance(names, str | Mapping) or not (names is None or all(isinstance(name, str) for name in names)):
            raise UsageError("class_names: expected a list of texts in label order.")
        if not isinstance(self.unit_rows, int) or self.unit_rows < 1:
            raise UsageError(f"unit_rows: expected a positive int, found {self.unit_rows!r}.")
        if self.distribution not in get_args(Distribution) or not isinstance(self.encoder, str):
            raise UsageError(
                f"expected a distribution of {', '.join(get_args(Distribution))} and a text as encoder, found "
                f"{self.distribution!r} and {self.encoder!r}."
            )


def create_cache(path: str | Location, features: Any, labels: ArrayLike, options: Options) -> CacheManifest:
    """Write a cache of features that were computed elsewhere; see `FeatureCache.create`.

    Returns:
        The manifest.

    Raises:
        UsageError: see `FeatureCache.create`.
        ArtifactError: a feature is not finite.
    """
    options.check()
    numbers, names = classes_of_numbers(np.asarray(labels), options.class_names)
    heldout = np.zeros(len(numbers), bool) if options.heldout is None else np.asarray(options.heldout)
    if heldout.shape != numbers.shape or heldout.dtype != bool:
        raise UsageError(
            f"heldout: expected {len(numbers)} of True and False, one per label, found {heldout.dtype} {heldout.shape}."
        )
    source = _Source.of(features, len(numbers))
    calibration = _calibration(source, np.flatnonzero(~heldout), options)
    out = absolute(location(path))
    if (out / MANIFEST_NAME).exists():
        raise UsageError(f"{out}: holds a finished artifact. Delete it, or give another path.")
    # The config is always the same, so that a call after an interrupted one may have other options.
    with WorkDir(StageSpec(out, CacheManifest, {"created_from": "arrays", "store_dtype": "float16"}, {})) as work:
        for part in ("journal", "features"):  # of a call that was interrupted, perhaps with other features
            remove_tree(out / part)
        journal = Journal(out)
        calibration.record(journal)
        spec = store_spec(source.shape, len(numbers), names, min(options.unit_rows, len(numbers)))
        store = FeatureStore.create(out, spec, calibration.mean, calibration.std)
        for unit, values in enumerate(source.units(spec)):
            work.check_lock()
            stored, fits = normalised(values, calibration)
            if not fits.all():
                row = spec.rows_of(unit)[int(np.flatnonzero(~fits)[0])]
                raise ArtifactError(f"row {row}: a feature is not finite, or too large for float16.")
            write_unit(store, journal, unit, stored, [])
        return publish_created(work, store, numbers, heldout, options.distribution, options.encoder)


def classes_of_numbers(labels: NDArray[Any], names: Sequence[str] | None) -> tuple[NDArray[np.int32], list[str]]:
    """Return (n,) int32 class numbers and the class names; without `names`, these are the numbers from 0.

    Raises:
        UsageError: no labels, labels that are no whole numbers, a number without a name, two names that are alike, or,
            without names, a number between others without a row.
    """
    if not labels.size:
        raise UsageError("labels: expected at least one row, found none.")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"labels: expected whole numbers, one per row, found {labels.dtype} {labels.shape}.")
    if names is not None and len({unicodedata.normalize("NFC", str(name)) for name in names}) < len(names):
        raise UsageError("class names: expected distinct names, found two that are alike.")
    low, high = int(labels.min()), int(labels.max())
    limit = high + 1 if names is None else len(names)
    if low < 0:
        raise UsageError(f"labels: expected numbers from 0 on, found {low}.")
    if high >= limit:
        raise UsageError(f"labels: expected 0 to {limit - 1} for {limit} class names, found {high}.")
    if names is None:
        found = np.unique(labels)
        if len(found) != limit:
            absent = int(np.flatnonzero(found != np.arange(len(found)))[0])
            raise UsageError(
                f"labels: there are {len(found)} numbers between 0 and {high}, and none is {absent}. Give all class "
                "names in label order (class_names, --class-names) if classes without rows are meant."
            )
        names = [str(number) for number in range(limit)]
    return labels.astype(np.int32), [str(name) for name in names]


def store_spec(shape: tuple[int, int, int, int], rows: int, class_names: Sequence[str], unit_rows: int) -> StoreSpec:
    """Return the spec of a float16 store for features of one row: (views, rows, columns, channels)."""
    views, high, wide, channels = shape
    return StoreSpec(rows, VIEWS[:views], (high, wide), channels, unit_rows, tuple(class_names))


def publish_created(
    work: WorkDir[CacheManifest],
    store: FeatureStore,
    labels: NDArray[np.int32],
    heldout: NDArray[np.bool_],
    distribution: Distribution,
    encoder: str,
) -> CacheManifest:
    """Complete and publish a cache whose units are written. Raises the errors of `complete_store`.

    Returns:
        The manifest.
    """
    stored, spec = complete_store(store, Journal(store.path), labels, heldout), store.spec
    channels = spec.channels // 2 if distribution == "gaussian" else spec.channels
    manifest = CacheManifest(
        num_samples=spec.num_samples,
        num_valid=int(stored.valid.sum()),
        num_rejected=len(stored.rejects),
        num_heldout=int(heldout.sum()),
        feature_shape=(*spec.grid, spec.channels),
        frozen_channels=channels,
        views=list(spec.views),
        unit_rows=spec.unit_rows,
        class_names=list(spec.class_names),
        backbone=encoder,
        backbone_weights="not recorded",
        content=stored.content,
        distribution=distribution,
        num_bytes=stored.num_bytes,
    )
    return publish_cache(work, manifest, store)


@dataclass(frozen=True)
class _Source:
    """Features of all rows: an array, or batches that can be read once."""

    array: Any  # indexed by slices of rows; None: batches
    batches: Iterator[NDArray[np.float32]]
    shape: tuple[int, int, int, int]  # of one row: views, rows, columns, channels
    count: int

    @classmethod
    def of(cls, features: Any, count: int) -> _Source:
        if isinstance(features, list | tuple) and len(features):
            features = np.concatenate([_with_views(part) for part in features])
        if len(getattr(features, "shape", ())):
            if features.shape[0] != count:
                raise UsageError(f"features: expected {count} rows, one per label, found {features.shape[0]}.")
            first = _with_views(features[:1])
            return cls(features, iter(()), first.shape[1:], count)
        if not isinstance(features, Iterable) or isinstance(features, str | Mapping):
            raise UsageError(f"features: expected an array or an iterator of batches, found {type(features).__name__}.")
        batches = map(_with_views, features)
        if (head := next(batches, None)) is None:
            raise UsageError("features: expected batches, found none.")
        return cls(None, itertools.chain([head], batches), head.shape[1:], count)

    def units(self, spec: StoreSpec) -> Iterator[NDArray[np.float32]]:
        """Yield the features of every unit, in order.

        Raises:
            UsageError: another number of rows than labels, or batches of different shapes.
        """
        if self.array is not None:
            for unit in range(spec.num_units):
                rows = spec.rows_of(unit)
                yield _with_views(self.array[rows.start : rows.stop])
            return
        waiting, unit, seen = np.zeros((0, *self.shape), np.float32), 0, 0
        for batch in self.batches:
            seen += len(batch)
            if batch.shape[1:] != self.shape or seen > self.count:
                raise UsageError(
                    f"features: expected {self.count} rows of {self.shape} (views, rows, columns, channels), found "
                    f"{seen} so far, the last of {batch.shape[1:]}."
                )
            waiting = np.concatenate([waiting, batch])
            while unit < spec.num_units and len(waiting) >= len(spec.rows_of(unit)):
                size = len(spec.rows_of(unit))
                yield waiting[:size].copy()
                waiting, unit = waiting[size:], unit + 1
        if seen < self.count:
            raise UsageError(f"features: expected {self.count} rows, one per label, found {seen}.")


def _with_views(features: Any) -> NDArray[np.float32]:
    """Return a float32 copy (n, views, rows, columns, channels) of features with or without the axis of views.

    Raises:
        UsageError: another number of axes or views.
    """
    if hasattr(features, "detach"):  # torch
        features = features.detach().cpu().float()
    try:
        values = np.asarray(features)
    except (TypeError, ValueError) as error:
        raise UsageError(f"features: expected arrays, found {type(features).__name__} ({error}).") from error
    if values.dtype.kind not in "fiu":
        raise UsageError(f"features: expected real numbers, found {type(features).__name__} of {values.dtype}.")
    values = values.astype(np.float32)
    if values.ndim == 4:
        values = values[:, None]
    if values.ndim != 5 or values.shape[1] not in (1, 2) or 0 in values.shape[1:]:
        raise UsageError(
            "features: expected arrays (n, row, column, channel), or (n, view, row, column, channel) with one view or "
            f"two, found {values.shape}."
        )
    return values


def _calibration(source: _Source, training: NDArray[np.int64], options: Options) -> Calibration:
    """Return the given normalisation, or measure it on evenly spread training rows.

    Raises:
        UsageError: an odd number of channels for a posterior, one of mean and std, or neither with an iterator.
        ArtifactError: a feature is not finite.
    """
    channels = source.shape[-1]
    if options.distribution == "gaussian" and channels % 2:
        raise UsageError(f"features: expected means and standard deviations, found {channels} channels.")
    if (options.mean is None) != (options.std is None):
        raise UsageError("mean and std: expected both or neither.")
    if options.mean is not None and options.std is not None:
        latent = channels // 2 if options.distribution == "gaussian" else channels
        return given_calibration(options.mean, options.std, latent, options.distribution)
    if source.array is None:
        raise UsageError("mean and std: expected both, because batches of an iterator can be read only once.")
    # Whole stretches of rows, because files with chunks of many rows are slow to read row by row.
    total, among = Moments.empty(channels), set(training.tolist()) or set(range(source.count))
    starts = sorted({row // STRETCH * STRETCH for row in among})
    for start in choose_evenly(starts, CALIBRATION_ROWS // STRETCH):
        values = _with_views(source.array[start : start + STRETCH])[:, 0]
        rows = [row for row in range(len(values)) if start + row in among]
        if not (fine := usable(values[rows])).all():
            row = start + rows[int(np.flatnonzero(~fine)[0])]
            raise ArtifactError(f"row {row}: a feature is not finite, or too large for float16.")
        total = total.merge(Moments.of(values[rows]))
    return measured_calibration(total, options.distribution)
