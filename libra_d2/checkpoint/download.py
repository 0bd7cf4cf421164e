# SPDX-License-Identifier: Apache-2.0
"""Files from the internet, checked against the hash in their name."""

import os
import re
from urllib.parse import urlparse

from iopath.common.file_io import get_cache_dir

from detectron2.utils.file_io import PathManager

from ..utils.digest import sha256

__all__ = ["fetch"]

_DATE = r"20\d\d[01]\d[0-3]\d"  # such as 20240115


def fetch(url: str) -> str:
    """
    Download a file to Detectron2's cache unless it is there. If its name ends in a hash, such as
    ``model-3afee3a9.pth``, its SHA-256 must start with it; otherwise it is removed. Eight digits
    that are a date are not a hash.

    Args:
        url: "http://..." or "https://...".

    Returns:
        path of the file.

    Raises:
        OSError: if the download fails or the hash differs. The message names the URL and where to
            put the file by hand.
    """
    try:
        path = PathManager.get_local_path(url)
    except OSError as e:
        cached = os.path.join(get_cache_dir(), urlparse(url).path.lstrip("/"))
        raise OSError(
            f"{url} could not be downloaded ({e}). If you fetch it by hand, put it at {cached}"
        ) from e
    match = re.search(rf"-(?!{_DATE}\.)([0-9a-f]{{8,64}})\.\w+$", url)
    if match is None:
        return path
    digest = sha256(path)
    if not digest.startswith(match.group(1)):
        size = os.path.getsize(path)
        os.remove(path)
        raise OSError(
            f"{url}: what was downloaded ({size} bytes) is not that file: its SHA-256 is "
            f"{digest}, but must start with {match.group(1)}. It was removed from "
            f"{path}; try again, or fetch it by hand and put it there"
        )
    return path
