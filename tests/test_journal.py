"""The journal rejects records whose files are missing, truncated or altered."""

from __future__ import annotations

from pathlib import Path

import pytest

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """Four units of two files each."""
    journal = Journal(tmp_path)
    for unit in range(4):
        names = [f"data/{unit}.{kind}" for kind in ("tar", "parquet")]
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(name.encode() * 9)
        journal.record(unit, {"rows": unit}, dict.fromkeys(names))
    return journal


def test_journal_records_are_read_back(journal: Journal) -> None:
    assert journal.read(2) == {"rows": 2}
    assert [file.name for file in journal.files(2)] == ["data/2.tar", "data/2.parquet"]
    assert journal.numbers() == [0, 1, 2, 3] and journal.missing(range(6)) == [4, 5]
    journal.record("a-set-000001", {})
    assert journal.names()[0] == "a-set-000001" and journal.missing(["a-set-000001", "a-set-000002"]) == [
        "a-set-000002"
    ]
    assert journal.numbers() == [0, 1, 2, 3]


def test_units_with_missing_or_truncated_files_are_missing(journal: Journal, tmp_path: Path) -> None:
    (tmp_path / "data/0.tar").unlink()
    (tmp_path / "data/2.parquet").write_bytes(b"cut")
    assert journal.missing(range(4)) == [0, 2]
    with pytest.raises(ArtifactError, match=r"data/0.tar: expected 90 bytes, found no file"):
        journal.check(0)
    with pytest.raises(ArtifactError, match=r"data/2.parquet: expected 126 bytes, found 3"):
        journal.check(2)


def test_an_altered_file_of_the_same_size_is_found_by_its_hash(journal: Journal, tmp_path: Path) -> None:
    file = tmp_path / "data/1.tar"
    file.write_bytes(file.read_bytes()[::-1])
    assert journal.missing(range(4)) == []
    assert journal.missing(range(4), deep=True) == [1]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"entry": {"rows": 3}, "files": []}', None])
def test_a_damaged_record_is_a_missing_unit(journal: Journal, content: str | None) -> None:
    record = journal.directory / "unit-000003.json"
    assert isinstance(record, Path)
    record.write_text(record.read_text().replace('"rows": 3', '"rows": 4') if content is None else content)
    assert journal.missing(range(4)) == [3]
    with pytest.raises(ArtifactError, match="unit-000003"):
        journal.read(3)


def test_a_missing_file_cannot_be_recorded(journal: Journal) -> None:
    with pytest.raises(ArtifactError, match="expected the file that was just written"):
        journal.record(7, {}, {"data/7.tar": None})
    assert not journal.has(7)
