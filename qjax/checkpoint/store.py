"""The folder that a checkpoint lives in: versions, a pointer to the current one, checksums, locks.

    path/
      CURRENT                   JSON: which version is current, and which older ones are kept
      versions/3-9f1c02ab/      one save; never changed once it is complete
        metadata.json           what was saved (see `qjax.checkpoint.metadata`)
        arrays/                 the numbers, written by Orbax
        manifest.json           bytes and SHA-256 of every other file; written last

A save fills a fresh version folder, makes it durable, and then replaces CURRENT by a rename, which is the one moment
at which anything changes for readers. Killed before it, the save has done nothing; killed after it, the save is done.
What is in the way is removed only afterwards: versions that CURRENT no longer names, and what killed saves left, at
the beginning of the next save. (Orbax's own overwriting removes the old checkpoint first, so it is never used.)

CURRENT and manifest.json carry a checksum of themselves, so that damage is told from a newer format.

Savers of one path take turns by a lock on the folder. A reader locks the version it reads, and a version that is
being read is not removed. Locks are the kernel's (flock): those of a killed process are gone with it. Where a file
system has none, a reader may find its version removed under it, reports that, and can simply load again.

Nothing here knows about models.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qjax.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: savers and readers are not kept apart there
    fcntl = None

FORMAT_VERSION = 1
"""Version of the folder's layout and of what its files say. A reader refuses what is newer than itself."""

POINTER, MANIFEST, METADATA, ARRAYS, VERSIONS = "CURRENT", "manifest.json", "metadata.json", "arrays", "versions"
_VERSION_NAME = re.compile(r"([0-9]+)-[0-9a-f]{8}")
_ADVICE = "restore the folder from a copy, or save the model again"
_LOCK_SECONDS = 600.0


@dataclass(frozen=True)
class Pointer:
    """What CURRENT says: the name of the current version, and of the older ones that are kept, newest first."""

    current: str
    older: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every version that is not to be removed."""
        return (self.current, *self.older)


# -- Writing -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path, keep: int) -> Iterator[Path]:
    """Give a fresh version folder to fill, and make it the current one if the block ends without an exception.

    Args:
        path: the checkpoint's folder; made where it is missing.
        keep: how many versions remain, the new one included.

    Raises:
        CheckpointError: the folder holds something else, or is locked by another saver for ten minutes.
    """
    _prepare(path)
    with _exclusive(path):
        before = _known_pointer(path)
        if before is not None or not (path / POINTER).exists():  # else it may still name something worth a rescue
            _clean(path, before.names if before else ())
        folder = path / VERSIONS / f"{_next_number(path)}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            yield folder
            _write_manifest(folder)
            kept = [name for name in before.names if (path / VERSIONS / name).is_dir()] if before else []
            now = Pointer(folder.name, tuple(kept[: keep - 1]))
            _point(path, now)
        except BaseException:
            if not _may_be_current(path, folder.name):
                _remove_failed(folder)
            raise
        _clean(path, now.names)


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file and make it durable."""
    with file.open("w", encoding="utf-8") as f:
        f.write(_text(data))
        f.flush()
        os.fsync(f.fileno())


def replace_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file with a checksum of itself in the place of an older one: at any moment one of the two is there.

    `read_sealed_json` reads it.
    """
    fresh = file.with_name(f"{file.name}.tmp")
    write_json(fresh, _sealed({"format": FORMAT_VERSION, **data}))
    os.replace(fresh, file)
    _sync_folder(file.parent)


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _prepare(path: Path) -> None:
    """Make the folder, or refuse one that holds something else."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; give a folder to save to")
    if path.is_dir() and not (path / POINTER).exists() and not (path / VERSIONS).is_dir():
        other = sorted(p.name for p in path.iterdir())
        if other:
            raise CheckpointError(
                f"{path} holds other things ({', '.join(other[:3])}) and no checkpoint; give a new or an empty folder"
            )
    new = not path.exists()
    (path / VERSIONS).mkdir(parents=True, exist_ok=True)
    if new:
        _sync_folder(path.parent)


def _next_number(path: Path) -> int:
    taken = (_VERSION_NAME.fullmatch(p.name) for p in (path / VERSIONS).iterdir())
    return 1 + max((int(match[1]) for match in taken if match), default=0)


def _write_manifest(folder: Path) -> None:
    """Write the checksums of all files in a version; everything in it is durable afterwards."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_sync_and_digest, files))
    table = {
        file.relative_to(folder).as_posix(): {"bytes": size, "sha256": digest}
        for file, (size, digest) in zip(files, digests, strict=True)
    }
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        _sync_folder(inner)
    write_json(folder / MANIFEST, _sealed({"format": FORMAT_VERSION, "files": table}))
    _sync_folder(folder)
    _sync_folder(folder.parent)


def _point(path: Path, pointer: Pointer) -> None:
    """Replace CURRENT: the moment at which a save takes effect."""
    replace_json(path / POINTER, {"current": pointer.current, "older": list(pointer.older)})


def _may_be_current(path: Path, name: str) -> bool:
    """Whether CURRENT names the version, or cannot be read: after an exception that came late."""
    if not (path / POINTER).exists():
        return False
    pointer = _known_pointer(path)
    return pointer is None or pointer.current == name


def _remove_failed(folder: Path) -> None:
    """Remove what a failed save wrote, which threads of the storage may still be writing for a moment."""
    for pause in (0.05, 0.05, 0.2, 0.8):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(pause)
        if not folder.exists():
            return


def _clean(path: Path, named: Iterable[str]) -> None:
    """Remove the versions that are not named and that nobody reads."""
    named = set(named)
    for folder in (path / VERSIONS).iterdir():
        if folder.name in named or not _VERSION_NAME.fullmatch(folder.name):
            continue
        lock = _lock(folder, shared=False)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()


# -- Reading -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Give the version folder to read: the current one of a checkpoint, or ``path`` itself if it is a version.

    While the block runs the version is not removed, even if a save replaces it.

    Raises:
        CheckpointError: there is no checkpoint, or its pointer is damaged or names a version that is missing.
    """
    if (path / MANIFEST).is_file():
        with contextlib.closing(_lock(path, shared=True) or _Lock(None)):
            yield path
        return
    seen = None
    while True:
        name = read_pointer(path).current
        folder = path / VERSIONS / name
        lock = _lock(folder, shared=True) if folder.is_dir() else None
        # Between reading the pointer and locking, a save may have moved on and removed the version: look again, and
        # believe what was seen twice.
        if lock is None and name != seen:
            seen = name
            continue
        with contextlib.closing(lock or _Lock(None)):
            if folder.is_dir():
                yield folder
                return
            if name == seen:
                raise CheckpointError(f"{path / POINTER} names the version {name}, and {folder} is missing; {_ADVICE}")
        seen = name


def read_pointer(path: Path) -> Pointer:
    """Read CURRENT.

    Raises:
        CheckpointError: there is none, or it is damaged or of a newer format.
    """
    if not (path / POINTER).is_file():
        if not path.exists():
            why = "there is no such folder"
        elif not path.is_dir():
            why = "it is a file"
        elif (path / VERSIONS).is_dir():
            why = "no save into it was ever completed"
        else:
            why = f"the folder has no file {POINTER}"
        raise CheckpointError(f"no checkpoint at {path}: {why}; give the folder that qjax.save wrote")
    data = read_sealed_json(path / POINTER)
    names = [data.get("current"), *(data.get("older") or ())]
    if not all(isinstance(name, str) and _VERSION_NAME.fullmatch(name) for name in names):
        raise CheckpointError(f"{path / POINTER} is damaged: it names no version; {_ADVICE}")
    return Pointer(names[0], tuple(names[1:]))


def verify(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files of a version with its manifest.

    Args:
        folder: a version.
        names: the files to verify; None is all of them.

    Raises:
        CheckpointError: the manifest is missing or damaged, or a file is missing, truncated or changed.
    """
    files = read_sealed_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or METADATA not in files:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it lists no {METADATA}; {_ADVICE}")
    wanted = list(files) if names is None else list(names)
    for name in wanted:  # sizes first: a truncated copy is found without reading gigabytes
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise CheckpointError(f"{folder / name} is missing; {_ADVICE}") from None
        if size != files[name]["bytes"]:
            what = "truncated" if size < files[name]["bytes"] else "changed"
            raise CheckpointError(
                f"{folder / name} was {what}: it has {size:,} bytes and not {files[name]['bytes']:,}; {_ADVICE}"
            )
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, (_, digest) in zip(wanted, pool.map(_digest, (folder / name for name in wanted)), strict=True):
            if digest != files[name]["sha256"]:
                raise CheckpointError(f"{folder / name} is damaged: its checksum has changed; {_ADVICE}")


def refuse_newer(file: Path, data: Any) -> None:
    """Refuse a file whose ``format`` is newer than `FORMAT_VERSION`, before anything else is read from it."""
    version = data.get("format") if isinstance(data, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has checkpoint format {version} and this qjax reads formats up to {FORMAT_VERSION}; "
            "install the qjax that wrote it, or a newer one"
        )


def _known_pointer(path: Path) -> Pointer | None:
    try:
        return read_pointer(path)
    except CheckpointError:
        return None


def read_sealed_json(file: Path) -> dict[str, Any]:
    """Read a JSON file with a checksum of itself.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    try:
        text = file.read_text(encoding="utf-8")
        data = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; {_ADVICE}") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); {_ADVICE}") from error
    except ValueError:
        raise CheckpointError(f"{file} is damaged: it is not JSON; {_ADVICE}") from None
    refuse_newer(file, data)
    if not isinstance(data, dict) or _text(_sealed(data)) != text:
        raise CheckpointError(f"{file} is damaged: its checksum does not match what it says; {_ADVICE}")
    return data


def _sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data with a checksum of itself under ``sha256``."""
    said = {key: value for key, value in data.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return {**said, "sha256": digest}


# -- Files and locks ---------------------------------------------------------------------------------------------------


def _digest(file: Path) -> tuple[int, str]:
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        return f.tell(), digest


def _sync_and_digest(file: Path) -> tuple[int, str]:
    with file.open("rb+") as f:  # Windows flushes only what may be written
        os.fsync(f.fileno())
    return _digest(file)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class _Lock:
    """A lock that is held until closed; of no file where the system has no locks."""

    def __init__(self, fd: int | None):
        self._fd = fd

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


def _lock(folder: Path, *, shared: bool) -> _Lock | None:
    """Lock a folder without waiting; None if that is impossible because somebody holds it, or it is gone."""
    if fcntl is None:
        return _Lock(None)
    try:
        fd = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError:
        return _Lock(None)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except OSError:  # a file system without locks
        os.close(fd)
        return _Lock(None)
    return _Lock(fd)


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Wait for other savers of this path, then keep them out."""
    end = time.monotonic() + _LOCK_SECONDS
    while (lock := _lock(path, shared=False)) is None:
        if time.monotonic() > end:
            raise CheckpointError(
                f"another process has been saving to {path} for {_LOCK_SECONDS:.0f} s; wait for it, or save elsewhere"
            )
        time.sleep(0.05)
    with contextlib.closing(lock):
        yield
