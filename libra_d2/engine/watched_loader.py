# SPDX-License-Identifier: Apache-2.0
from typing import Any, Dict, Iterable, Iterator, List

__all__ = ["WatchedLoader"]


class WatchedLoader:
    """A data loader that keeps its last batch and can be closed."""

    def __init__(self, loader: Iterable[List[Dict[str, Any]]]):
        self.loader = loader
        self.last_batch: List[Dict[str, Any]] = []
        self._iterators: List[Iterator[List[Dict[str, Any]]]] = []

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        self._iterators.append(self._watch())
        return self._iterators[-1]

    def _watch(self) -> Iterator[List[Dict[str, Any]]]:
        for batch in self.loader:
            self.last_batch = batch
            yield batch

    def close(self) -> None:
        """End the data loading workers."""
        while self._iterators:
            self._iterators.pop().close()

    @property
    def last_files(self) -> List[str]:
        """The image files of the last batch."""
        return [str(image.get("file_name", "?")) for image in self.last_batch]
