"""Ways in which a sealed folder comes to differ from what was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rrhf.sealed_folders import seal_folder

Damage = Callable[[Path], None]


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x40
    path.write_bytes(data)


def flipped(name: str, place: float = 0.5) -> Damage:
    return lambda folder: flip(folder / name, place)


def cut(name: str) -> Damage:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return apply


def grown(name: str) -> Damage:
    def apply(folder: Path) -> None:
        with open(folder / name, "ab") as file:
            file.write(b"\0")

    return apply


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def made_a_folder(name: str) -> Damage:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


def added(name: str, content: bytes = b"{}") -> Damage:
    def apply(folder: Path) -> None:
        assert not (folder / name).exists()
        (folder / name).write_bytes(content)

    return apply


def replaced_by_other_weights(name: str) -> Damage:
    """A whole file of the right size, of another step."""

    def apply(folder: Path) -> None:
        weights = {key: value + 1 for key, value in load_file(folder / name).items()}
        size = (folder / name).stat().st_size
        save_file(weights, folder / name, {"format": "pt"} if name.startswith("model") else None)
        assert (folder / name).stat().st_size == size

    return apply


def infinite(name: str) -> Damage:
    """Sealed as it is: what an earlier version could leave."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / name)
        next(iter(weights.values())).view(-1)[0] = torch.inf
        save_file(weights, folder / name)
        seal_folder(folder)

    return apply


def manifest_text(text: str | bytes) -> Damage:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder: bool((folder / "manifest.json").write_bytes(data)) and None


def manifest_torn(folder: Path) -> None:
    cut("manifest.json")(folder)


def manifest_with(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return apply


def entry(name: str, value: Any) -> Damage:
    return manifest_with(lambda manifest: manifest["files"].update({name: value}))


def delisted(name: str, and_removed: bool = False) -> Damage:
    def apply(folder: Path) -> None:
        manifest_with(lambda manifest: manifest["files"].pop(name))(folder)
        if and_removed:
            (folder / name).unlink()

    return apply


def manifest_damages(listed: str) -> dict[str, Damage]:
    """Of any sealed folder; `listed` is the name of one of its files."""
    return {
        "manifest torn": manifest_torn,
        "manifest empty": manifest_text(""),
        "manifest of bytes": manifest_text(b"\xff\xfe\x00\x93"),
        "manifest deeply nested": manifest_text("[" * 100_000),
        "status of no manifest": manifest_with(lambda m: m.update(status="unfinished")),
        "status null": manifest_with(lambda m: m.update(status=None)),
        "no files": manifest_with(lambda m: m.pop("files")),
        "files a list": manifest_with(lambda m: m.update(files=[])),
        "files null": manifest_with(lambda m: m.update(files=None)),
        "files empty": manifest_with(lambda m: m.update(files={})),
        "entry null": entry(listed, None),
        "entry a list": entry(listed, []),
        "entry of text": entry(listed, {"bytes": "12", "sha256": 12}),
        "entry outside": entry("../settings.json", {"bytes": 1, "sha256": "0"}),
        "entry of no name": entry("a\0b", {"bytes": 1, "sha256": "0"}),
        "entry too long": entry("a" * 300, {"bytes": 1, "sha256": "0"}),
        "another digest": entry(listed, {"bytes": 0, "sha256": "0" * 64}),
        "newer schema": manifest_with(lambda m: m.update(schema_version=99)),
        "schema of text": manifest_with(lambda m: m.update(schema_version="1")),
    }


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
