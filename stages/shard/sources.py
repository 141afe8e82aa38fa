"""Sources of images: folders, tars, zips, and Hugging Face tables. Lists their files, and reads one at a time.

    CLASS/NAME.jpg               a folder, or the same in a .tar or .zip; `train/` and `val/` in an archive are splits
    CLASS.tar/NAME.jpg           a tar of class tars: ILSVRC2012_img_train.tar
    *.parquet, *.arrow           rows with the bytes of an image and a label, see tables.py

Archives are not unpacked: images are read by their offset, in any order, by several processes.
"""

from __future__ import annotations

import functools
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import read_range
from svgpipe.manifests.shards import Split

from ..images.decode import EXTENSIONS
from ..images.folder import visible_files
from .entries import HELDOUT, SPLITS, TRAIN, Entry, Listing
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
        tables = [] if any(_is_image(entry.name) for entry in entries) else _tables_in(source, split)
        return list_tables(tables) if tables else Listing(entries)
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
        # A broken symbolic link is an input that cannot be read, and is rejected with that reason.
        status = entry.stat(follow_symlinks=entry.is_file())
        name = os.path.relpath(entry.path, source)
        folder, slash, _ = name.partition(os.sep)
        yield Entry(name, status.st_size, status.st_mtime_ns, folder if slash else None, origin)


def _in_tar(source: Path) -> Iterator[Entry]:
    """Yield the files of a tar, and of the tars in it, which are classes.

    Raises:
        UsageError: it is no tar, or is truncated or damaged.
    """
    origin, modified = str(source.absolute()), source.stat().st_mtime_ns
    try:
        with tarfile.open(source, mode="r:") as tar:
            for member in tar:
                if member.isdir() or _is_hidden(member.name):
                    continue
                if member.isfile() and member.name.endswith(".tar"):
                    yield from _in_class_tar(tar, member, modified, origin)
                else:
                    place, problem = (member.offset_data,), _problem_of(member)
                    yield Entry(member.name, member.size, modified, None, origin, place, problem=problem)
            lost = left_unread(source, tar.offset, source.stat().st_size)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UsageError(f"{source}: expected a tar, found something else, or a damaged one ({error}).") from error
    if lost is not None:
        raise UsageError(f"{source}: is truncated or damaged: offset {lost[0]}: {lost[1]}. Download it again.")


def _in_class_tar(tar: tarfile.TarFile, member: tarfile.TarInfo, modified: int, origin: str) -> Iterator[Entry]:
    folder = PurePosixPath(member.name).with_suffix("").as_posix()
    try:
        with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
            for image in inner:
                if not image.isdir() and not _is_hidden(image.name):
                    name, place = f"{folder}/{image.name}", (member.offset_data + image.offset_data,)
                    yield Entry(name, image.size, modified, None, origin, place, problem=_problem_of(image))
    except (tarfile.TarError, EOFError, ValueError) as error:
        yield Entry(f"{member.name}", 0, modified, None, origin, problem=f"damaged tar of a class ({error})")


def _problem_of(member: tarfile.TarInfo) -> str:
    if not member.isfile():
        return "not a file: a link or a special file"
    return "sparse member: its bytes are not stored in one piece" if member.issparse() else ""


def _in_zip(source: Path) -> Iterator[Entry]:
    origin, modified = str(source.absolute()), source.stat().st_mtime_ns
    for member in _zip_of(origin).infolist():
        if not member.is_dir() and not _is_hidden(member.filename):
            yield Entry(member.filename, member.file_size, modified, None, origin)


class _SharedZip:
    """An open zip. Threads take turns."""

    def __init__(self, path: str) -> None:
        self._zip, self._turn = zipfile.ZipFile(path), threading.Lock()
        self.infolist = self._zip.infolist

    def read(self, name: str) -> bytes:
        with self._turn:
            try:
                return self._zip.read(name)
            except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, encrypted, odd method
                raise OSError(0, str(error)) from error


@functools.lru_cache(maxsize=4)
def _zip_of(path: str) -> _SharedZip:
    return _SharedZip(path)


def _is_hidden(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in parts)


def _classified(entries: Sequence[Entry], split: Split) -> list[Entry]:
    """Return the entries of one split with their classes.

    Folders that hold everything are skipped, as `ILSVRC/Data/CLS-LOC/` of the Kaggle zip. The first folder below, or
    below that of the split, is the class.
    """
    parts = {entry.name: PurePosixPath(entry.name).parts for entry in entries}
    of_images = [parts[entry.name][:-1] for entry in entries if _is_image(entry.name)]
    depth = 0
    while of_images and len({folders[depth : depth + 1] for folders in of_images}) == 1 and of_images[0][depth:]:
        depth += 1
    tops = {folders[depth] for folders in of_images if len(folders) > depth}
    wanted = tops
    if tops and {top.lower() for top in tops} <= SPLITS:
        names = TRAIN if split == "train" else HELDOUT
        wanted, depth = {top for top in tops if top.lower() in names}, depth + 1
        entries = [entry for entry in entries if len(p := parts[entry.name]) > depth and p[depth - 1] in wanted]
    elif not tops and depth:  # all images lie in one folder, which is their class
        depth -= 1
    below = ((entry, PurePosixPath(entry.name).parts[depth:]) for entry in _without_duplicates(entries))
    return [replace(entry, class_name=rest[0] if len(rest) > 1 else None) for entry, rest in below]


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
    """Return the tables of one split in a folder or in its `data/`: files are named SPLIT-00000-of-00001.parquet."""
    for place in (folder, folder / "data"):
        tables = sorted(path for path in place.glob("*") if path.suffix in TABLES) if place.is_dir() else []
        if not tables:
            continue
        wanted = TRAIN if split == "train" else HELDOUT
        chosen = [path for path in tables if path.name.partition("-")[0].lower() in wanted]
        return chosen or [path for path in tables if path.name.partition("-")[0].lower() not in SPLITS]
    return []
