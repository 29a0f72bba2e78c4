"""Folders of shards beside a manifest: written whole or not at all, so that an interruption costs one shard at most."""

import json
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn


MANIFEST = "manifest.json"


def write_file(path: Path, data: bytes, keep_existing: bool = False) -> None:
    """Write a file so that it is there whole, or not at all.

    With `keep_existing`, of several processes that write it at the same time the first one wins.
    """
    # Unique, so that two processes that write the same file do not mix
    scratch = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        scratch.unlink(missing_ok=True)
        with open(scratch, "xb") as file:  # not through a link that someone has put there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not keep_existing:
            os.replace(scratch, path)
        elif not path.exists():
            try:
                os.link(scratch, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.replace(scratch, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"`{path}` cannot be written: {reason}. What is finished is kept: free some space and go on."
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def remove_scratch_files(folder: Path) -> None:
    """Remove what writers on this machine have left behind when they were killed."""
    for kind in ("parquet", "json"):
        for scratch in folder.glob(f".*.{kind}.{socket.gethostname()}.*.tmp"):
            if not _is_running(scratch.name.split(".")[-2]):
                scratch.unlink(missing_ok=True)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


class Manifest(dict[str, Any]):
    """What a manifest says, or a part of it: what it lacks, or says in another type, raises `ValueError` with its path."""

    path: Path

    def __missing__(self, name: str) -> NoReturn:
        raise _damaged(self.path, f"it lacks {name!r}")

    def number(self, name: str, least: int = 0) -> int:
        """The integer called `name`, at least `least`."""
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _damaged(self.path, f"{name!r} is {value!r:.40}, expected an integer of at least {least}")
        return value

    def part(self, name: str) -> "Manifest":
        """The mapping called `name`."""
        value = self[name]
        if not isinstance(value, Manifest):
            raise _damaged(self.path, f"{name!r} is no mapping")
        return value


def _damaged(path: Path, reason: Any) -> ValueError:
    return ValueError(f"`{path}` is damaged ({reason}). Delete the folder, or choose another.")


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """Return what `manifest.json` says: how the shards were made, and what is known of their number and totals."""
    path = Path(folder) / MANIFEST

    def mapping(values: dict[str, Any]) -> Manifest:
        found = Manifest(values)
        found.path = path
        return found

    try:
        manifest = json.loads(path.read_text(encoding="utf-8"), object_hook=mapping)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(manifest, Manifest):
        raise _damaged(path, f"it holds a {type(manifest).__name__}")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any], keep_existing: bool = False) -> None:
    """Write the manifest; with `keep_existing` only if there is none yet."""
    write_file(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode(), keep_existing)


def check_manifest(folder: Path, format_: Any, settings: Mapping[str, Any], what: str) -> None:
    """Raise if the folder holds data that the shards to come must not be mixed with.

    Args:
        folder: Folder of the shards; it need not be there.
        format_: What the manifest must say of its format.
        settings: What the shards to come depend on, as far as it is known.
        what: How the messages call the data.
    """
    if not (folder / MANIFEST).is_file():
        found = sorted(path.name for path in folder.glob("*.parquet"))
        if found:
            raise ValueError(
                f"`output_dir='{folder}'` holds data of other origin ({', '.join(found[:3])}; there is no {MANIFEST}). "
                "Choose another `output_dir`."
            )
        return
    manifest = read_manifest(folder)
    if manifest.get("format") != format_:
        raise ValueError(
            f"`output_dir='{folder}'` holds a {MANIFEST} that this version of the library did not write for {what}. Choose "
            "another `output_dir`."
        )
    known = manifest.part("settings")
    differing = [f"{name}={known.get(name)!r} (now {v!r})" for name, v in settings.items() if known.get(name) != v]
    if differing:
        raise ValueError(
            f"`output_dir='{folder}'` holds {what} that were made with {', '.join(differing)}. Choose another `output_dir`, "
            "or, to go on there, give the same again."
        )


def claim_shards(folder: Path, manifest: Mapping[str, Any], what: str) -> None:
    """Write the manifest of shards, or, where there is one, warn if their library versions differ; `what`: as above."""
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, manifest, keep_existing=True)
    if differing := differing_versions(read_manifest(folder).part("versions"), manifest["versions"]):
        warnings.warn(
            f"The first {what} in '{folder}' were made with {differing}: the rest may not be what an uninterrupted run would "
            "have given."
        )


def differing_versions(found: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return the library versions that are not what they were, as text."""
    return ", ".join(f"{name} {found.get(name)} (now {v})" for name, v in now.items() if found.get(name) != v)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what other processes write. Not by a collective: those have timeouts, which a slower process may exceed."""
    while not condition():
        time.sleep(0.2)
