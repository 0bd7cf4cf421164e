# SPDX-License-Identifier: Apache-2.0
"""
Files of datasets in Detectron2's format, which all processes of a machine share in memory.

A file is a sequence of arrays in NumPy's format, as ``numpy.save`` writes them: numbers that all
images are looked through for, the coordinates of polygons, and the rest of each image as JSON, in
which each polygon is replaced by its number of coordinates. The JSON is parsed when the image is
used. Nothing in the file is executed.
"""

import json
import os
from array import array
from itertools import chain, islice
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from numpy.typing import DTypeLike
from torch.utils import data as torchdata

from detectron2.structures import BoxMode

from ..utils.atomic_write import atomic_write

__all__ = ["LAYOUT", "MappedRecords", "Outline", "RecordWriter", "all_objects"]

#: the arrays of a file in their order; those of bytes are last, so that the others are aligned
LAYOUT = (
    *("text_ends", "names_ends", "polygons_ends", "first_objects", "sizes", "classes"),
    *("num_keypoints", "polygons", "is_crowd", "names", "text", "info"),
)


def _text(value: Any) -> str:
    """Of bytes, as pycocotools compresses masks; it reads text, too."""
    if not isinstance(value, bytes):
        raise TypeError(f"JSON cannot hold a {type(value).__name__}")
    return value.decode("ascii")


_encode = json.JSONEncoder(check_circular=False, separators=(",", ":"), default=_text).encode


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def _write_header(file, length: int, dtype: DTypeLike) -> None:
    """That of an array whose values are written next."""
    header = {"shape": (length,), "fortran_order": False, "descr": np.dtype(dtype).str}
    np.lib.format.write_array_header_1_0(file, header)


class RecordWriter:
    """Collects images and their objects, in any order, and writes the file."""

    def __init__(self) -> None:
        self._ids: List[Any] = []
        self._numbers: Dict[Any, int] = {}
        self._names: List[bytes] = []
        self._heads: List[bytes] = []
        self._sizes = array("q")
        # Of objects: their JSON, the coordinates of their polygons, and numbers.
        self._text, self._ends, self._images = bytearray(), array("q", [0]), array("q")
        self._polygons, self._polygon_ends = array("d"), array("q", [0])
        self._classes, self._crowds, self._keypoints = array("q"), array("b"), array("q")
        self._class_numbers: Dict[Any, int] = {}

    def add_image(self, file_name: str, fields: Dict[str, Any]) -> None:
        """Add an image without objects; its ``fields`` are those of Detectron2's format."""
        image_id = fields["image_id"]
        if image_id in self._numbers:
            raise ValueError(f"image id {image_id} occurs more than once")
        self._numbers[image_id] = len(self._ids)
        self._ids.append(image_id)
        self._names.append(os.fsencode(file_name))
        self._heads.append(_encode(fields)[:-1].encode() + b',"annotations":[')
        self._sizes.extend((fields["width"], fields["height"]))

    def add_record(self, record: Dict[str, Any]) -> None:
        """
        Add an image in Detectron2's format.

        Raises:
            KeyError, TypeError, ValueError: if it lacks a field, or JSON cannot hold a value.
        """
        names = ("file_name", "annotations")
        fields = {key: value for key, value in record.items() if key not in names}
        self.add_image(record["file_name"], fields)
        for annotation in record["annotations"]:
            self.add_object(record["image_id"], annotation)

    def add_object(self, image_id: Any, annotation: Dict[str, Any]) -> None:
        """Add an object in Detectron2's format to an image."""
        self._images.append(self._numbers[image_id])
        polygons = annotation.get("segmentation")
        if isinstance(polygons, (list, tuple)):
            for polygon in polygons:
                self._polygons.extend(polygon)
            annotation = {**annotation, "segmentation": [len(x) for x in polygons]}
        self._polygon_ends.append(len(self._polygons))
        self._text += _encode(annotation).encode()
        self._ends.append(len(self._text))
        category = annotation["category_id"]
        self._classes.append(self._class_numbers.setdefault(category, len(self._class_numbers)))
        self._crowds.append(bool(annotation.get("iscrowd", 0)))
        keypoints = annotation.get("keypoints")
        self._keypoints.append(sum(v > 0 for v in keypoints[2::3]) if keypoints else 0)

    def _order(self) -> List[int]:
        """The images in the order of their ids."""
        return sorted(range(len(self._ids)), key=self._ids.__getitem__)

    def images(self) -> Tuple[List[str], np.ndarray]:
        """The names of the images, and their widths and heights (N, 2), as in the file."""
        order = self._order()
        sizes = np.array(self._sizes).reshape(-1, 2)[order]
        return [os.fsdecode(self._names[i]) for i in order], sizes

    def save(self, path: str, info: Dict[str, Any], categories: Optional[List] = None) -> None:
        """
        Write the file, with the images in the order of their ids.

        Args:
            path: of the file.
            info: what JSON can hold, for :attr:`MappedRecords.info`.
            categories: the ids of the categories in the order of the classes, if the objects have
                them in place of classes.
        """
        num_images = len(self._ids)
        order = self._order()
        rank = np.empty(num_images, np.int64)
        rank[order] = np.arange(num_images)
        owners = rank[np.asarray(self._images)]
        objects = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=num_images)
        first = np.concatenate([[0], np.cumsum(counts)])
        coordinates = np.bincount(owners, np.diff(self._polygon_ends), num_images).astype(np.int64)
        lengths = np.bincount(owners, np.diff(self._ends), num_images).astype(np.int64)
        lengths += np.array([len(self._heads[i]) for i in order], np.int64)
        lengths += np.maximum(counts - 1, 0) + 2  # commas, and the end
        to_class = {id: number for number, id in enumerate(categories or ())}
        class_of = np.array([to_class.get(x, x) for x in self._class_numbers], np.int64)
        names = [self._names[i] for i in order]
        arrays = {
            "text_ends": np.cumsum(lengths),
            "names_ends": np.cumsum([len(name) for name in names]),
            "polygons_ends": np.cumsum(coordinates),
            "first_objects": first,
            "sizes": np.asarray(self._sizes).reshape(-1, 2)[order],
            "classes": class_of[np.asarray(self._classes)[objects]],
            "num_keypoints": np.bincount(owners, self._keypoints, num_images).astype(np.int64),
            "is_crowd": np.asarray(self._crowds, bool)[objects],
            "names": _bytes(b"".join(names)),
            "info": _bytes(_encode({**info, "categories": categories}).encode()),
        }
        objects = objects.tolist()
        pieces = {  # of arrays that would take much memory a second time
            "text": (np.uint8, lengths, self._lines(order, objects, first.tolist())),
            "polygons": (np.float64, coordinates, self._coordinates(objects)),
        }
        with atomic_write(path) as file:
            for name in LAYOUT:
                if name not in pieces:
                    np.save(file, arrays[name])
                    continue
                dtype, sizes, parts = pieces[name]
                _write_header(file, int(sizes.sum()), dtype)
                file.writelines(parts)

    def _lines(self, order: List[int], objects: List[int], first: List[int]) -> Iterator[bytes]:
        text, ends = memoryview(self._text), self._ends
        for image, start, end in zip(order, first, first[1:]):
            parts = (text[ends[i] : ends[i + 1]] for i in objects[start:end])
            yield self._heads[image] + b",".join(parts) + b"]}"

    def _coordinates(self, objects: List[int]) -> Iterator[memoryview]:
        polygons, ends = memoryview(self._polygons), self._polygon_ends
        return (polygons[ends[i] : ends[i + 1]] for i in objects)


def _map(path: str) -> Dict[str, np.ndarray]:
    """
    The arrays of a file.

    Raises:
        OSError, ValueError: if it is missing or cut short.
    """
    content = np.asarray(np.memmap(path, np.uint8, "r"))
    arrays = {}
    with open(path, "rb") as file:
        for name in LAYOUT:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            end = start + dtype.itemsize * int(np.prod(shape))
            arrays[name] = content[start:end].view(dtype).reshape(shape)
            file.seek(end)
    return arrays


class MappedRecords(torchdata.Dataset):
    """
    The images of a file in Detectron2's format, see :class:`RecordWriter`. The file is mapped into
    memory, which processes on the same machine share. Other processes get its path.
    """

    def __init__(self, path: str, image_root: str = "", indices: Optional[np.ndarray] = None):
        """
        Args:
            path: of the file.
            image_root: directory that the names of images are relative to.
            indices: of the images, in ascending order; all by default.

        Raises:
            OSError, ValueError: if the file is missing, cut short or another one.
        """
        self.path = path
        self.image_root = image_root
        self._arrays = _map(path)
        self.info: Dict[str, Any] = json.loads(self._arrays["info"].tobytes())
        categories = self.info["categories"]
        #: the class of each category id, if the file has them
        self.class_of = categories and {id: i for i, id in enumerate(categories)}
        self._indices = indices

    def __reduce__(self) -> Tuple[Callable, Tuple]:
        return MappedRecords, (self.path, self.image_root, self._indices)

    @property
    def indices(self) -> Sequence[int]:
        """Of these images in the file."""
        return range(len(self.all_sizes)) if self._indices is None else self._indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        """An image in Detectron2's format, which is the caller's own."""
        i = int(self.indices[index])
        record = json.loads(self._piece("text", i).tobytes())
        coordinates = iter(self._piece("polygons", i).tolist())
        for annotation in record["annotations"]:
            annotation["bbox_mode"] = BoxMode(annotation["bbox_mode"])
            polygons = annotation.get("segmentation")
            if isinstance(polygons, list):
                annotation["segmentation"] = [list(islice(coordinates, n)) for n in polygons]
            if self.class_of:
                annotation["category_id"] = self.class_of[annotation["category_id"]]
        return {"file_name": os.path.join(self.image_root, self._name(i)), **record}

    def _piece(self, name: str, index: int) -> np.ndarray:
        """The part of an array that belongs to an image."""
        ends = self._arrays[f"{name}_ends"]
        return self._arrays[name][ends[index - 1] if index else 0 : ends[index]]

    def _name(self, index: int) -> str:
        return os.fsdecode(self._piece("names", index).tobytes())

    @property
    def all_sizes(self) -> np.ndarray:
        """(N, 2) widths and heights of all images in the file, in pixels."""
        return self._arrays["sizes"]

    def all_names(self) -> List[str]:
        """The names of all images in the file."""
        return [self._name(i) for i in range(len(self.all_sizes))]

    def select(self, is_selected: np.ndarray) -> "MappedRecords":
        """The images for which a value is true, of one for each image in the file."""
        selected = np.asarray(is_selected)[self.indices]
        indices = np.asarray(self.indices)[selected]
        return MappedRecords(self.path, self.image_root, indices)

    def num_objects(self) -> np.ndarray:
        """The number of objects other than crowds in each image of the file."""
        objects = np.concatenate([[0], np.cumsum(~self._arrays["is_crowd"])])
        return np.diff(objects[self._arrays["first_objects"]])

    def num_keypoints(self) -> np.ndarray:
        """The number of visible keypoints in each image of the file."""
        return self._arrays["num_keypoints"]

    def classes(self, index: int, with_crowds: bool) -> List[int]:
        """The classes of the objects of an image."""
        i = int(self.indices[index])
        start, end = self._arrays["first_objects"][i : i + 2]
        classes = self._arrays["classes"][start:end]
        return (classes if with_crowds else classes[~self._arrays["is_crowd"][start:end]]).tolist()


class Outline:
    """The classes of each image of some datasets, in Detectron2's format."""

    def __init__(self, datasets: Sequence[MappedRecords], with_crowds: bool = True):
        """Args: datasets: one after the other; with_crowds: whether crowds have a class."""
        self.datasets, self.with_crowds = datasets, with_crowds

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        for dataset in self.datasets:
            for i in range(len(dataset)):
                classes = dataset.classes(i, self.with_crowds)
                yield {"annotations": [{"category_id": x} for x in classes]}


def all_objects(datasets: Sequence[MappedRecords]) -> Iterator[Dict[str, Any]]:
    """The classes of all objects of some datasets other than crowds, in Detectron2's format."""
    images = Outline(datasets, with_crowds=False)
    return chain.from_iterable(image["annotations"] for image in images)
