"""Files that survive a crash of the machine, and the manifest that tells a whole folder from a damaged one.

manifest.json is written last: {"format": 1, "files": {name: {"bytes": size, "sha256": hex}}}, of every other file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_rpp.observability.files import sync_path, write_whole

MANIFEST = "manifest.json"
_CHUNK_BYTES = 2**22
_OF_OLD_VERSIONS = ("run_state.json", "metadata.json", ".metadata", "common.pt")  # which wrote no manifest
FileFacts = dict[str, dict[str, Any]]
"""File name -> {"bytes": size, "sha256": hex}."""


def facts_of(folder: Path, names: Iterable[str]) -> FileFacts:
    """Size and checksum of files of `folder`, each brought to disk first."""
    facts = {}
    for name in names:
        sync_path(folder / name)
        facts[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    return facts


def sha256_of(path: Path) -> str:
    """In hexadecimal, as the command sha256sum says it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raises FileNotFoundError where `facts` lacks a file of `folder`: nobody would notice its loss."""
    unknown = {path.name for path in folder.iterdir()} - facts.keys()
    if unknown:
        raise FileNotFoundError(f"{folder}: no rank has hashed {', '.join(sorted(unknown))}")
    told = json.dumps({"format": 1, "files": dict(sorted(facts.items()))}, indent=1)
    write_whole(folder / MANIFEST, told, durable=True)


def read_manifest(folder: Path) -> FileFacts | None:
    """None where there is none. Raises ValueError where it is damaged."""
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {str(name): {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])} for name, f in files.items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def damage(folder: Path, *, read: bool, part: slice = slice(None)) -> list[str]:
    """What is wrong with the checkpoint `folder`, a line each; none where it is whole.

    read: compare checksums too, not sizes alone. part: of the files, by their place in the manifest; ranks share
    the work so.
    """
    try:
        facts = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    if facts is None:
        return [f"{folder / name} is missing" for name in _OF_OLD_VERSIONS if not (folder / name).is_file()]
    found = []
    for name, fact in list(facts.items())[part]:
        try:
            found += _damage_of(folder / name, fact, read)
        except OSError as error:
            found.append(f"{folder / name}: {error.strerror}")
    return found


def _damage_of(path: Path, fact: Mapping[str, Any], read: bool) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing"]
    if (size := path.stat().st_size) != fact["bytes"]:
        return [f"{path} has {size} of {fact['bytes']} bytes"]
    if read and sha256_of(path) != fact["sha256"]:
        return [f"{path} has another checksum than when it was written"]
    return []
