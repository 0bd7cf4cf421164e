# SPDX-License-Identifier: Apache-2.0
import ctypes
import platform

__all__ = ["keep_freed_memory"]

# Parameters of mallopt(3), as in malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """
    Let the main thread of this process keep memory that was freed, and use it again. When a block
    of more than 32 MB, such as the features of a large image, is freed, glibc returns it to the
    system, which has to clear as many pages for the next one.

    A small tensor that is kept can prevent that the memory beside it is used again. If a script
    keeps the tensors of each image, memory grows with every image.

    Returns:
        whether the C library is glibc, and has accepted it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, -1))
