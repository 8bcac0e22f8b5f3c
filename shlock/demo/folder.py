"""The demo's work: which files there are, and the digest of one; for the workers and for the sequential run alike."""

from __future__ import annotations

import errno
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "LARGEST_FILE",
    "DemoError",
    "File",
    "Listing",
    "digest_of",
    "digest_of_failure",
    "failure_of",
    "list_files",
    "standard_library",
]

LARGEST_FILE = 8 * 2**20
"""Larger files are left out (bytes): a worker that is killed again and again would never get to the end of one."""


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True)
class File:
    """One file to hash, and how it looked when it was listed."""

    path: str
    size: int
    mtime_ns: int

    def changed(self) -> bool:
        """Whether somebody has written or removed the file since it was listed."""
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return True
        return (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns)


@dataclass(frozen=True)
class Listing:
    """The files to hash, in the order of their paths, and how many were too large."""

    files: list[File]
    left_out: int

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(f.size for f in self.files)


def standard_library() -> Path:
    """The folder of Python's own standard library: a few thousand real files that are there wherever this runs."""
    return Path(sysconfig.get_path("stdlib"))


def list_files(folder: Path) -> Listing:
    """List the regular files below a folder. Raises DemoError when there are none or when it is no folder.

    Symbolic links are not followed. Left out are ``__pycache__``, because any Python that starts meanwhile may write
    there, files of more than LARGEST_FILE bytes (see there), and packages installed into the standard library's folder.
    """
    if not folder.exists():
        raise DemoError(f"{folder}: there is no such folder")
    if not folder.is_dir():
        raise DemoError(f"{folder}: not a folder")
    skipped = {"__pycache__"} | ({"site-packages"} if folder == standard_library() else set())
    files = []
    left_out = 0
    for root, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped]
        with os.scandir(root) as entries:
            for entry in entries:
                if not entry.is_file(follow_symlinks=False):
                    continue
                status = entry.stat(follow_symlinks=False)
                if status.st_size > LARGEST_FILE:
                    left_out += 1
                else:
                    files.append(File(entry.path, status.st_size, status.st_mtime_ns))
    if not files:
        too_large = f", only {left_out} of more than {LARGEST_FILE:,} bytes" if left_out else ""
        raise DemoError(f"{folder}: holds no file that can be hashed{too_large}; give a folder with some files")
    return Listing(sorted(files, key=lambda f: f.path), left_out)


def digest_of(path: str) -> tuple[int, bytes]:
    """Size in bytes and SHA-256 of a file. One that cannot be read counts 0 bytes and a digest of its errno's name."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        return digest_of_failure(failure_of(error))
    return len(content), hashlib.sha256(content).digest()


def failure_of(error: OSError) -> bytes:
    """Why a file cannot be read: the name of the errno."""
    return errno.errorcode.get(error.errno or 0, "unknown").encode()


def digest_of_failure(failure: bytes) -> tuple[int, bytes]:
    """Size and digest of a file that cannot be read."""
    return 0, hashlib.sha256(b"cannot be read: " + failure).digest()
