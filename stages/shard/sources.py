"""Sources of images: folders, tars, zips, and Hugging Face tables. Lists their files, and reads one at a time.

    CLASS/NAME.jpg               a folder, or the same in a .tar or .zip; `train/` and `val/` in an archive are splits
    CLASS.tar/NAME.jpg           a tar of class tars: ILSVRC2012_img_train.tar
    *.parquet, *.arrow           rows with the bytes of an image and a label, see tables.py

Archives are not unpacked: images are read by their offset, in any order, by several processes.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from svgpipe.manifests.errors import UsageError, first_line
from svgpipe.manifests.filesystem import read_range
from svgpipe.manifests.shards import Split

from ..images.decode import EXTENSIONS
from ..images.folder import visible_files
from .entries import HELDOUT, SPLITS, TRAIN, Entry, Listing, modified_ns
from .tables import TABLES, list_tables, read_row
from .tar_members import left_unread

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def list_source(source: Path, split: Split) -> Listing:
    """List a folder, tar, zip or table.

    Args:
        source: path.
        split: which images are wanted if an archive or a folder of tables holds several splits.

    Returns:
        Its files.

    Raises:
        UsageError: it is none of these.
    """
    if source.is_dir():
        entries = list(_in_folder(source))
        tables = _tables_in(source, split)
        published = any(re.search(r"-[0-9]+-of-[0-9]+\.", path.name) for path in tables)
        in_classes = any(_is_image(entry.name) and entry.class_name is not None for entry in entries)
        use_tables = tables and (published or not in_classes)
        return list_tables(tables) if use_tables else Listing(entries)
    if not source.exists():
        raise UsageError(f"{source}: expected a folder of class folders, a tar, a zip or tables, found nothing.")
    if source.name.endswith(COMPRESSED_TARS):
        raise UsageError(f"{source}: is compressed, so its images cannot be read one by one. Decompress it first.")
    if source.suffix in TABLES:
        return list_tables([source])
    if source.suffix == ".tar":
        return Listing(_classified(list(_in_tar(source)), split))
    if zipfile.is_zipfile(source):
        return Listing(_classified(list(_in_zip(source)), split))
    raise UsageError(f"{source}: expected a folder of class folders, a .tar, a .zip or tables, found another file.")


def read_entry(origin: str, name: str, place: tuple[int, ...], size: int) -> bytes:
    """Return the content of a file of a source.

    Raises:
        OSError: it cannot be read.
    """
    path = Path(origin)
    if path.suffix in TABLES and place:
        return read_row(path, place)
    if path.suffix == ".tar" and place:
        return read_range(path, place[0], size)
    if not path.is_dir():
        return _zip_of(origin).read(name)
    return (path / name).read_bytes()


def _in_folder(source: Path) -> Iterator[Entry]:
    origin = str(source.absolute())
    for entry in visible_files(source):
        path = Path(entry.path)
        try:
            status, problem = path.stat(), ""
        except OSError as error:  # a link that leads to nothing, or to itself
            status, problem = path.lstat(), f"unreadable: {error.strerror}"
        if not problem and not stat.S_ISREG(status.st_mode):  # reading a pipe would block
            problem = "not a file: a pipe, socket or device"
        name = os.path.relpath(entry.path, source)
        folder, slash, _ = name.partition(os.sep)
        yield Entry(name, status.st_size, modified_ns(status), folder if slash else None, origin, problem=problem)


def _in_tar(source: Path) -> Iterator[Entry]:
    """Yield the files of a tar, and of the tars in it, which are classes.

    Raises:
        UsageError: it is no tar, or is truncated or damaged.
    """
    origin, modified = str(source.absolute()), modified_ns(source.stat())
    try:
        with tarfile.open(source, mode="r:") as tar:
            for member in tar:
                if member.isdir() or _is_hidden(member.name):
                    continue
                if member.isfile() and member.name.endswith(COMPRESSED_TARS):
                    raise UsageError(f"{source}: its tar {member.name} is compressed. Decompress it first.")
                if member.isfile() and member.name.endswith(".tar"):
                    yield from _in_class_tar(tar, member, modified, origin)
                else:
                    place, problem = (member.offset_data,), _problem_of(member)
                    yield Entry(member.name, member.size, modified, None, origin, place, problem=problem)
            size = source.stat().st_size
            lost = left_unread(source, tar.offset, size)
            if tar.offset >= size:
                lost = size, "no end marker, so members after it may be missing"
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UsageError(f"{source}: expected a tar, found something else, or a damaged one ({error}).") from error
    if lost is not None:
        raise UsageError(f"{source}: is truncated or damaged: offset {lost[0]}: {lost[1]}. Download it again.")


def _in_class_tar(tar: tarfile.TarFile, member: tarfile.TarInfo, modified: int, origin: str) -> Iterator[Entry]:
    """Yield the files of the tar of one class.

    Raises:
        UsageError: it is empty, truncated or damaged: the class, or a part of it, would vanish.
    """
    folder, start, empty = PurePosixPath(member.name).with_suffix("").as_posix(), member.offset_data, True
    try:
        with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
            for image in inner:
                empty = empty and image.isdir()
                if not image.isdir() and not _is_hidden(image.name):
                    place, problem = (start + image.offset_data,), _problem_of(image)
                    yield Entry(f"{folder}/{image.name}", image.size, modified, None, origin, place, problem=problem)
            end = start + member.size
            lost = left_unread(Path(origin), start + inner.offset, end)
            why = "it is empty" if empty else "it has no end" if start + inner.offset >= end else lost and lost[1]
    except (tarfile.TarError, EOFError, ValueError) as error:
        why = str(error)
    if why:
        raise UsageError(f"{origin}: its tar {member.name} is damaged or truncated ({why}). Download it again.")


def _problem_of(member: tarfile.TarInfo) -> str:
    if unsafe := _unsafe(member.name):
        return unsafe
    if not member.isfile():
        return "not a file: a link or a special file"
    return "sparse member: its bytes are not stored in one piece" if member.issparse() else ""


def _unsafe(name: str) -> str:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "unsafe name: an absolute path, or one that leads to a folder above"
    return ""


def _in_zip(source: Path) -> Iterator[Entry]:
    origin, modified = str(source.absolute()), modified_ns(source.stat())
    for member in _zip_of(origin).infolist():
        if not member.is_dir() and not _is_hidden(member.filename):
            problem = _unsafe(member.filename)
            yield Entry(member.filename, member.file_size, modified, None, origin, problem=problem)


class _SharedZip:
    """An open zip. Threads take turns."""

    def __init__(self, path: str) -> None:
        self._zip, self._turn = zipfile.ZipFile(path), threading.Lock()
        self.infolist = self._zip.infolist

    def read(self, name: str) -> bytes:
        with self._turn:
            try:
                return self._zip.read(name)
            except Exception as error:  # damaged, encrypted, of an unknown method: each codec has its own errors
                raise OSError(0, first_line(error)) from error


def _zip_of(path: str) -> _SharedZip:
    return _opened_zip(path, Path(path).stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _opened_zip(path: str, modified_ns: int) -> _SharedZip:
    del modified_ns  # a replaced zip is opened again
    return _SharedZip(path)


def _is_hidden(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in parts)


def _classified(entries: Sequence[Entry], split: Split) -> list[Entry]:
    """Return the entries of one split with their classes.

    Folders that hold everything are skipped, as `ILSVRC/Data/CLS-LOC/` of the Kaggle zip. The first folder below, or
    below that of the split, is the class.
    """
    entries = list(_without_duplicates(entries))
    of_images = [_folders(entry) for entry in entries if _is_image(entry.name) and not _unsafe(entry.name)]
    depth = 0
    while of_images and len({folders[depth : depth + 1] for folders in of_images}) == 1 and of_images[0][depth:]:
        depth += 1
    tops = {folders[depth] for folders in of_images if len(folders) > depth}
    with_folders = {folders[depth] for folders in of_images if len(folders) > depth + 1}
    if with_folders & _of(tops, TRAIN | HELDOUT) or (tops and tops == _of(tops, SPLITS)):
        return list(_of_split(entries, depth, _of(tops, SPLITS), split))
    if not tops and depth:  # all images lie in one folder, which is their class
        depth -= 1
    return [replace(entry, class_name=_class_at(entry, depth)) for entry in entries]


def _of_split(entries: Sequence[Entry], depth: int, splits: set[str], split: Split) -> Iterator[Entry]:
    """Yield the entries of one split with their classes. Files outside of all splits count as training files.

    Only lists and the like above the folder of the splits do not count.
    """
    wanted = _of(splits, TRAIN if split == "train" else HELDOUT)
    for entry in entries:
        folders = _folders(entry)
        top = folders[depth] if len(folders) > depth else None
        if top in wanted:
            yield replace(entry, class_name=_class_at(entry, depth + 1))
        elif top not in splits and split == "train" and (len(folders) >= depth or _is_image(entry.name)):
            yield entry


def _folders(entry: Entry) -> tuple[str, ...]:
    return PurePosixPath(entry.name).parts[:-1]


def _of(names: set[str], kinds: frozenset[str]) -> set[str]:
    return {name for name in names if name.lower() in kinds}


def _class_at(entry: Entry, depth: int) -> str | None:
    """Return the folder at this depth, which is the class; None without one."""
    folders = _folders(entry)[depth:]
    return folders[0] if folders and not entry.problem.startswith("unsafe") else None


def _without_duplicates(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Yield all entries. Of several with one name, the last one counts, as when an archive is unpacked."""
    last = {entry.name: number for number, entry in enumerate(entries)}
    for number, entry in enumerate(entries):
        if last[entry.name] == number:
            yield entry
        else:
            problem = "duplicate name: a later file of the archive has it too"
            yield replace(entry, name=f"{entry.name}#{number}", problem=problem)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


def _tables_in(folder: Path, split: Split) -> list[Path]:
    """Return the tables of one split in a folder or in its `data/`: SPLIT-00000-of-00001.parquet, SPLIT.parquet.

    Raises:
        UsageError: some of the files that the names count are missing, or both folders hold tables.
    """
    places = {place: _table_files(place) for place in (folder, folder / "data")}
    if all(places.values()):
        raise UsageError(f"{folder}: expected tables in one folder, found some in it and in its data/. Give one table.")
    for place, tables in places.items():
        if not tables:
            continue
        wanted = TRAIN if split == "train" else HELDOUT
        chosen = [path for path in tables if split_word(path) in wanted]
        chosen = chosen or [path for path in tables if split_word(path) not in SPLITS]
        totals = {int(match[1]) for path in chosen if (match := re.search(r"-of-([0-9]+)\.", path.name))}
        if len(totals) == 1 and len(chosen) != (total := totals.pop()):
            raise UsageError(f"{place}: expected {total} tables, as {chosen[0].name} says, found {len(chosen)}.")
        return chosen
    return []


def _table_files(folder: Path) -> list[Path]:
    """Return the tables directly in a folder, without the caches of `datasets`."""
    found = sorted(path for path in folder.glob("*") if path.suffix in TABLES) if folder.is_dir() else []
    return [path for path in found if not path.name.startswith(("cache-", "."))]


def split_word(table: Path) -> str:
    """Return the split in a file name; if it names none, its first word.

    `train` of train-00000-of-00002.parquet, train_0.parquet and cifar10-train.arrow (a cache of `datasets`).
    """
    words = re.split(r"[-_.]", table.name.lower())
    return next((word for word in (words[0], *reversed(words)) if word in SPLITS), words[0])
