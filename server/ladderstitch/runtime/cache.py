"""The cache: folders of files that can be made again at any time."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from ladderstitch.errors import ConfigError

log = logging.getLogger(__name__)

CACHE_VARIABLE = "LADDERSTITCH_CACHE"
"""Environment variable that names the folder of the cache."""


def cache_home() -> Path:
    """Return the folder of the cache.

    It is LADDERSTITCH_CACHE, or `ladderstitch` in the user's cache folder; if that cannot be
    written, a folder of this user in the system's temporary one.
    """
    if home := os.environ.get(CACHE_VARIABLE):
        return Path(home)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not Path(caches).is_absolute():  # a user id without an entry in passwd, and no HOME
        return _temporary_home()
    cache = Path(caches) / "ladderstitch"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError as error:
        fallback = _temporary_home()
        log.warning("cache folder %s cannot be written (%s); using %s", cache, error, fallback)
        return fallback


def _temporary_home() -> Path:
    """Return a folder that only this user can write: its files decide what is computed.

    Raises `ConfigError` if no folder can be written.
    """
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as error:  # a read-only file system without volumes
        raise ConfigError(f"{CACHE_VARIABLE}: expected a folder to write to, got none") from error
    path = Path(temporary) / f"ladderstitch-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
        return path
    return Path(tempfile.mkdtemp(prefix="ladderstitch-"))


def cached_folder(kind: str, key: str, fill: Callable[[Path], None]) -> Path:
    """Return the folder `kind`/`key` of the cache; let `fill` write its files if it is missing.

    The folder appears at once and complete, so that processes that make it at the same time do not
    disturb each other. Raises what `fill` raises, and `OSError` if the cache cannot be written.
    """
    folder = cache_home() / kind / key
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        fill(partial)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # another process was not faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
