#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""
Convert annotations in Pascal VOC's format, with one XML file for each image, to a COCO JSON.

    python tools/voc_to_coco.py --annotations Annotations/ --list ImageSets/Main/train.txt \
        --images JPEGImages/ --output train.json

Without --list, all XML files are converted, those in subfolders too. The classes are those in the
files, sorted by name. Use --classes to set them if a split may not contain all of them. Objects
marked as difficult become crowd regions, which are ignored in training and evaluation.
"""

import argparse
import glob
import json
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Optional
from xml.etree import ElementTree

from tqdm import tqdm

from libra_d2.data.coco_schema import MAX_SIDE
from libra_d2.engine import argument_parser, report_errors
from libra_d2.errors import InputError, counted, one_line
from libra_d2.utils.atomic_write import atomic_write
from libra_d2.utils.display import display_name
from libra_d2.utils.output_path import output_path


def build_argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = argument_parser(__doc__)
    parser.add_argument("--annotations", required=True, metavar="DIR", help="folder of XML files")
    parser.add_argument("--images", required=True, metavar="DIR")
    parser.add_argument("--list", metavar="FILE", help="file names without suffix, one per line")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="class names in order; default: those found"
    )
    parser.add_argument("--output", required=True, metavar="FILE")
    return parser


def read_number(element: ElementTree.Element, name: str, is_length: bool = False) -> float:
    """A number of pixels in an element; lengths are whole and at least 1. Raises: ValueError."""
    text = element.findtext(name)
    if text is None:
        raise ValueError(f"<{element.tag}> has no <{name}>")
    value = float(text)
    if not abs(value) <= MAX_SIDE or (is_length and (value < 1 or value != int(value))):
        wanted = "whole number" if is_length else "number"
        raise ValueError(f"<{name}> is {text.strip()}, no {wanted} of pixels up to {MAX_SIDE}")
    return int(value) if is_length else value


def read_object(element: ElementTree.Element) -> Dict[str, Any]:
    """One of the "objects" of :func:`read_xml`. Raises: ValueError: if it is broken."""
    box, name = element.find("bndbox"), element.findtext("name", "").strip()
    if box is None or not name:
        raise ValueError("it lacks <name> or <bndbox>")
    x0, y0, x1, y1 = (read_number(box, k) for k in ("xmin", "ymin", "xmax", "ymax"))
    for side, low, high in (("x", x0, x1), ("y", y0, y1)):
        if low > high:
            raise ValueError(f"<{side}min> is {low:g}, beyond <{side}max>, {high:g}")
    difficult = int(element.findtext("difficult") or 0)
    return {
        "name": name,
        "difficult": difficult,
        "bbox": [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
    }


def read_xml(path: Path) -> Dict[str, Any]:
    """
    Read one annotation file: "file_name", "width", "height", and "objects" with "name", "difficult"
    and "bbox" (absolute XYWH). VOC counts pixels from 1, and both corners belong to the box.

    Raises:
        InputError: if the file is broken or incomplete, or a box or the image has no extent.
    """
    place = ""
    try:
        root = ElementTree.parse(path).getroot()
        size = root.find("size")
        if size is None:
            raise ValueError("there is no <size>")
        width, height = (read_number(size, k, is_length=True) for k in ("width", "height"))
        objects = []
        for i, element in enumerate(root.iter("object"), 1):
            place = f"object {i} ({display_name(element.findtext('name', '?'))}): "
            objects.append(read_object(element))
        file_name = root.findtext("filename")
        return {"file_name": file_name, "width": width, "height": height, "objects": objects}
    except (OSError, ValueError, ElementTree.ParseError) as e:
        raise InputError(f"{path}: {place}{one_line(e)}") from e


def find_xml_files(folder: Path) -> List[Path]:
    """
    The XML files in a folder, whatever the case of their suffix, and in the folders in it but for
    hidden ones, such as .ipynb_checkpoints.
    """
    found = (path for path in folder.rglob("*") if path.suffix.lower() == ".xml")
    return sorted(x for x in found if not re.search(r"(^|/)\.", x.relative_to(folder).as_posix()))


def find_image(folder: Path, stem: str, file_name: Optional[str]) -> str:
    """
    Name of the image in ``folder`` for ``stem``.xml: of several with this stem the one that is
    named. Raises: InputError: if there is none.
    """
    # <filename> may contain the path on another machine, and be that before the file was renamed.
    named = Path((file_name or "").replace("\\", "/")).name
    names = [*(stem + suffix for suffix in (".jpg", ".png", ".jpeg", ".JPG")), named]
    if Path(named).stem == Path(stem).name:
        names.insert(0, str(Path(stem).with_name(named)))
    for name in names:
        if name and (folder / name).is_file():
            return name
    raise InputError(f"{folder / stem}.*: there is no image for {stem}.xml")


def convert(
    annotations: Path, images: Path, files: List[Path], classes: Optional[List[str]]
) -> Dict[str, List]:
    """
    The content of a COCO JSON for these XML files in the folder ``annotations``.

    Raises:
        InputError: if a file is missing or broken, has an object of none of ``classes``, or is for
            the same image as another one.
    """
    records = {path: read_xml(path) for path in tqdm(files, unit="file")}
    found = {o["name"] for record in records.values() for o in record["objects"]}
    names = classes or sorted(found)
    if len(set(names)) < len(names):
        raise InputError(f"--classes: one of {names} is there twice; quote names with spaces")
    if found - set(names):
        others = ", ".join(map(repr, sorted(found - set(names))))
        raise InputError(f"--classes: {others} in {annotations} must be named, too")
    ids = {name: i for i, name in enumerate(names, 1)}
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    dataset = {"images": [], "annotations": [], "categories": categories}
    file_of: Dict[str, Path] = {}
    for image_id, (path, record) in enumerate(records.items(), 1):
        file = Path(os.path.relpath(path, annotations))
        name = find_image(images, str(file.with_suffix("")), record["file_name"])
        if name in file_of:
            both = f"{file_of[name]} and {file}"
            raise InputError(f"{annotations}: {both} stand for the same image, {name}: remove one")
        file_of[name] = file
        objects = record.pop("objects")
        dataset["images"].append({**record, "id": image_id, "file_name": name})
        for o in objects:
            annotation = {
                "id": len(dataset["annotations"]) + 1,
                "image_id": image_id,
                "category_id": ids[o["name"]],
                "bbox": o["bbox"],
                "area": o["bbox"][2] * o["bbox"][3],
                "iscrowd": int(o["difficult"] != 0),
            }
            dataset["annotations"].append(annotation)
    return dataset


def run(args: argparse.Namespace) -> None:
    """Read, convert, and write a dataset."""
    annotations, images = Path(args.annotations), Path(args.images)
    for option, folder in (("--annotations", annotations), ("--images", images)):
        if not folder.is_dir():
            raise InputError(f"{option}: {folder}: no such folder")
    files = found = find_xml_files(annotations)
    if args.list:
        try:
            # VOC's lists of a single class have a second column.
            lines = Path(args.list).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"--list: {args.list}: {one_line(e)}") from e
        stems = [line.split()[0] for line in lines if line.strip()]
        file_of = {path.with_suffix(""): path for path in found}
        files = [file_of.get(annotations / x, annotations / f"{x}.xml") for x in stems]
    if not files:
        raise InputError(f"--annotations: {annotations}: there are no XML files")
    dataset = convert(annotations, images, files, args.classes)
    used = [str(images / image["file_name"]) for image in dataset["images"]]
    beside = glob.glob(os.path.join(glob.escape(args.images), "*"))
    others = {
        "--annotations": [str(path) for path in (*found, *files)],
        "--images": [*used, *(path for path in beside if not path.endswith(".json"))],
        "--list": args.list,
    }
    output = output_path("--output", args.output, others)
    with atomic_write(output, "w") as f:
        json.dump(dataset, f, allow_nan=False)
    num_difficult = sum(x["iscrowd"] for x in dataset["annotations"])
    num_empty = len(dataset["images"]) - len({x["image_id"] for x in dataset["annotations"]})
    print(
        f"{args.output}: {counted(len(dataset['images']), 'image')}, "
        f"{counted(len(dataset['annotations']), 'object')}, "
        f"{num_difficult} of them difficult; nothing is annotated in {num_empty} of the images"
    )


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
