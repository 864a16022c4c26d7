"""Documents from files: the interpreter's own library sources, or a folder of .txt, .jsonl and .jsonl.gz."""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

STDLIB = "stdlib"
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
# tests repeat themselves, and packages installed beside the library are not part of it
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}


def find_files(source: str) -> list[Path]:
    """The files of a source in a fixed order. Raises ValueError when there are none."""
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in root.rglob("*.py") if not SKIPPED & set(f.relative_to(root).parts)]
    else:
        root = Path(source)
        if not root.exists():
            raise ValueError(f"data.source ({source}) does not exist; give a file, a folder, or {STDLIB!r}")
        files = [root] if root.is_file() else [f for f in root.rglob("*") if f.is_file()]
        files = [f for f in files if f.name.endswith(SUFFIXES)]
    if not files:
        raise ValueError(f"data.source ({source}) has no files that end in {', '.join(SUFFIXES)}")
    return sorted(files)


def fingerprint(files: list[Path]) -> str:
    """Changes whenever a file is added, removed, renamed, resized or touched."""
    seen = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr(seen).encode(), digest_size=8).hexdigest()


def read_documents(files: list[Path]) -> Iterator[tuple[str, str]]:
    """(name, text) of every document that is not empty; a .txt or .py file is one, a .jsonl line is one.

    Names are paths below the folder all files share. Raises ValueError with file and line for what cannot be read.
    """
    root = os.path.commonpath([file.parent for file in files])
    for file in files:
        name = file.relative_to(root).as_posix()
        if file.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_lines(file, name)
        else:
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                if file.suffix == ".py":
                    continue  # a few library sources declare another encoding
                raise ValueError(f"{file}: not UTF-8 text at byte {error.start}; convert it") from None
            if text.strip():
                yield name, text


def _read_lines(file: Path, name: str) -> Iterator[tuple[str, str]]:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    document = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{file}:{number}: not JSON ({error.msg}); every line must be one object"
                    ) from None
                if not isinstance(document, dict) or not isinstance(document.get("text"), str):
                    raise ValueError(f'{file}:{number}: must be an object with a string field "text"')
                try:
                    document["text"].encode()
                except UnicodeEncodeError:
                    raise ValueError(f"{file}:{number}: the text has half a surrogate pair; repair it") from None
                if document["text"].strip():
                    yield f"{name}:{number}", document["text"]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a whole gzip file ({error}); fetch it again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text at byte {error.start}; convert it") from None
