# SPDX-License-Identifier: Apache-2.0
from typing import Any, Dict, Iterable, Iterator, List

__all__ = ["WatchedLoader"]


class WatchedLoader:
    """A data loader that remembers what it gave last."""

    def __init__(self, loader: Iterable[List[Dict[str, Any]]]):
        """Args: loader: gives batches of a model's inputs."""
        self.loader = loader
        self.last_batch: List[Dict[str, Any]] = []

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        for batch in self.loader:
            self.last_batch = batch
            yield batch

    @property
    def last_files(self) -> List[str]:
        """The image files of the last batch."""
        return [str(image.get("file_name", "?")) for image in self.last_batch]
