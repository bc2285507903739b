"""Seals folders with a manifest, written last, that records the size and SHA-256 of each file.

Checkpoints and the models of a run are sealed when they are written and compared with their
manifest when they are read. A checkpoint that differs is damaged. A model folder that differs may
have been edited on purpose; `--accept_edited_files` allows that. Model folders without an rrhf
manifest, such as those that other programs write, are not checked.

If a subfolder has its own manifest, that manifest covers the subfolder's files. Standard library
only.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rrhf.files import sha256_file, sync_folder
from rrhf.manifests import COMPLETE, MANIFEST, DamagedManifest, load_manifest, write_manifest

# (path, size, modification time, inode) -> SHA-256 of a file that this process has read.
_known: dict[tuple[str, int, int, int], str] = {}
_CLOCK_STEP = 2_000_000_000


def seal_folder(folder: Path, known: Mapping[str, Any] | None = None) -> None:
    """Sync every file and subfolder of a folder, then write its manifest.

    Every file gets the permissions of a new file, because some libraries write weights that other
    users cannot read.

    Args:
        folder: the complete folder.
        known: further entries for the manifest.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    mode = mode_of_new_file(folder)
    files: dict[str, dict[str, Any]] = {}
    for path in _own_files(folder):
        if path.name != MANIFEST and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    for inner in sorted(folder.rglob("*"), reverse=True):
        if inner.is_dir():
            sync_folder(inner)
    write_manifest(folder, {"status": COMPLETE, **(known or {}), "files": files})


def mode_of_new_file(folder: Path) -> int:
    """Return the permissions of a new file under the current umask."""
    probe = folder / f".mode.{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)


def damage_of(folder: Path) -> str | None:
    """Describe the first difference of a folder from its manifest; None if there is none.

    A missing manifest counts as damage.
    """
    try:
        manifest = load_manifest(folder / MANIFEST)
    except DamagedManifest as error:
        return str(error)
    if manifest is None:
        return f"it has no {MANIFEST}, so it was never finished"
    return next((told for _, told in differences(folder, manifest)), None)


def differences(
    folder: Path, manifest: Mapping[str, Any], deep: bool = True
) -> Iterator[tuple[str | None, str]]:
    """Yield each difference of a folder from its manifest, as a file and a text.

    The file is None if the manifest itself is unfinished or names no files.

    Args:
        folder: a sealed folder.
        manifest: its manifest.
        deep: compare the bytes of every file; otherwise weights are compared only by size.
    """
    if manifest.get("status") != COMPLETE:
        yield None, f"{MANIFEST} says {manifest.get('status')!r} instead of {COMPLETE!r}"
        return
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        yield None, f"{MANIFEST} names no files"
        return
    for name, seal in files.items():
        told = _difference(folder, name, seal, deep)
        if told is not None:
            yield name, told
    there = {path.relative_to(folder).as_posix() for path in _own_files(folder)}
    for name in sorted(there - files.keys() - {MANIFEST}):
        if not Path(name).name.startswith("."):  # hidden files are ignored
            yield name, f"{name} is not in {MANIFEST}"


def _difference(folder: Path, name: str, seal: Any, deep: bool) -> str | None:
    """Describe how one file differs from its entry in the manifest; None if it does not."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or name in ("", MANIFEST):
        return f"{MANIFEST} names {name!r}, which is not a file of the folder"
    if not _is_seal(seal):
        return f"{MANIFEST} says of {name} {json.dumps(seal)[:60]}, not its bytes and SHA-256"
    try:
        size = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):  # the name is one that no file can have
        size = None
    if size is None:
        return f"{name} is missing"
    if size != seal["bytes"]:
        return f"{name} has {size:,} bytes instead of {seal['bytes']:,}"
    if not deep and path.suffix in (".safetensors", ".pt", ".bin"):
        return None
    if _sha256(path) != seal["sha256"]:
        return f"{name} has other bytes than were written"
    if path.name == MANIFEST and (told := damage_of(path.parent)) is not None:
        return f"{path.parent.relative_to(folder)}: {told}"
    return None


def _is_seal(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("bytes"), int)
        and isinstance(value.get("sha256"), str)
    )


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file, cached because policy and reference are often the same
    model."""
    found = path.stat()
    key = (str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ino)
    if key in _known:
        return _known[key]
    digest = sha256_file(path)
    if time.time_ns() - found.st_mtime_ns > _CLOCK_STEP:  # a later write would change the time
        _known[key] = digest
    return digest


def _own_files(folder: Path) -> Iterator[Path]:
    """Yield every file that the folder's manifest covers; of a sealed subfolder, only its
    manifest."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            inner = path / MANIFEST
            yield from [inner] if inner.is_file() else _own_files(path)
        else:
            yield path
