# SPDX-License-Identifier: Apache-2.0
import hashlib

__all__ = ["sha256"]


def sha256(path: str) -> str:
    """The SHA-256 of a local file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
