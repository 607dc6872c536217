"""Unique texts and keys to plant in a program, and a search for them in whatever was exported.

The search sees through what exporters and stores do to text: JSON escapes, base64, gzip and zip, and the pages of a
sqlite file. Point it at bytes or at a whole folder::

    place = Canaries()
    program(question=place.text("prompt"))
    assert not place.found_in(tmp_path)
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import sqlite3
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

_PIECE = 12
"""Characters of a key that are as bad as all of it."""


class Canaries:
    """What was planted, by the name of its place."""

    def __init__(self) -> None:
        self.planted: dict[str, str] = {}

    def text(self, place: str) -> str:
        """A word for a place of content: no key by its look, and no name of a choice."""
        return self.planted.setdefault(place, f"Zq{place.replace(' ', '')}Qz")

    def key(self, place: str, start: str = "") -> str:
        """A secret: without ``start``, one that only its name or its owner give away.

        Args:
            place: where it is put.
            start: how it begins, if it has the look of a provider's key (``sk-proj-``).
        """
        number = len(self.planted)
        return self.planted.setdefault(place, f"{start}w{number:02d}Kx7{place.replace(' ', '')}9Vb{number:02d}q")

    # --- the search -------------------------------------------------------------------------------------------------
    def found_in(self, where: bytes | str | Path) -> dict[str, list[str]]:
        """The places whose texts or keys show in ``where``, each with what it was found in.

        Args:
            where: bytes, text, a file or a folder, which is searched with all that is below it, names included.
        """
        found: dict[str, list[str]] = {}
        for name, data in _pieces(where):
            for place, needles in self._needles().items():
                if any(needle in data for needle in needles):
                    found.setdefault(place, []).append(name)
        return found

    def _needles(self) -> dict[str, list[bytes]]:
        made: dict[str, list[bytes]] = {}
        for place, token in self.planted.items():
            # A key that was cut in two is still most of a key.
            middle = token[len(token) // 2 - _PIECE // 2 :][:_PIECE] if len(token) > 2 * _PIECE else token
            plain = token.encode()
            made[place] = [middle.encode(), *(_inside_base64(plain, shift) for shift in range(3))]
        return made


def _inside_base64(token: bytes, shift: int) -> bytes:
    """What the base64 of any text with ``token`` in it contains, if it begins at this place modulo 3."""
    coded = base64.b64encode(b"\0" * shift + token)
    return coded[(shift * 8 + 5) // 6 : (len(token) + shift) * 8 // 6]


def _pieces(where: bytes | str | Path) -> Iterator[tuple[str, bytes]]:
    if isinstance(where, str):
        yield "text", where.encode("utf-8", "surrogatepass")
    elif isinstance(where, bytes):
        yield from _unpacked("bytes", where)
    elif where.is_dir():
        for path in sorted(where.rglob("*")):
            name = str(path.relative_to(where))
            yield f"name of {name}", name.encode()
            if path.is_file():
                yield from _of_file(name, path)
    else:
        yield from _of_file(where.name, where)


def _of_file(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    data = path.read_bytes()
    if data.startswith(b"SQLite format 3\0"):
        yield name, data  # what was deleted is still there
        yield from _of_sqlite(name, path)
    else:
        yield from _unpacked(name, data)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                yield f"{name}:{member}", archive.read(member)


def _unpacked(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    yield name, data
    if data.startswith(b"\x1f\x8b"):
        yield f"{name} (gzip)", gzip.decompress(data)
    elif data[:1] == b"\x78":
        with contextlib.suppress(zlib.error):
            yield f"{name} (deflate)", zlib.decompress(data)


def _of_sqlite(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    """Every cell: a long one lies scattered over pages in the file."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for row in connection.execute(f'SELECT * FROM "{table}"'):
                cells = (cell if isinstance(cell, bytes) else str(cell).encode() for cell in row if cell is not None)
                yield f"{name}:{table}", b"\0".join(cells)
    finally:
        connection.close()
