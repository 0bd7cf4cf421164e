#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Convert annotations in Pascal VOC's format, one XML file for each image, to a COCO JSON.

    python tools/voc_to_coco.py --annotations Annotations/ --list ImageSets/Main/train.txt \
        --images JPEGImages/ --output train.json

Without --list all XML files are converted. Classes are those found, sorted by name, or --classes,
which are needed if a split may lack one. Difficult objects become crowd regions, which are neither
trained on nor counted in evaluation.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional
from xml.etree import ElementTree

from tqdm import tqdm

from libra_d2.engine import report_errors
from libra_d2.errors import InputError, one_line
from libra_d2.utils.atomic_write import atomic_write


def build_argument_parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", required=True, metavar="DIR")
    parser.add_argument("--images", required=True, metavar="DIR")
    parser.add_argument("--list", metavar="FILE", help="names without suffix, one in each line")
    parser.add_argument("--classes", nargs="+", metavar="NAME")
    parser.add_argument("--output", required=True, metavar="FILE")
    return parser


def read_xml(path: Path) -> Dict[str, Any]:
    """
    Read one annotation file: "file_name", "width", "height", and "objects" with "name", "difficult"
    and "bbox" (absolute XYWH). VOC counts pixels from 1, and both corners belong to the box.

    Raises:
        InputError: if the file is broken or incomplete.
    """

    def number(element: ElementTree.Element, name: str) -> float:
        text = element.findtext(name)
        if text is None:
            raise ValueError(f"<{element.tag}> has no <{name}>")
        return float(text)

    try:
        root = ElementTree.parse(path).getroot()
        size = root.find("size")
        if size is None:
            raise ValueError("there is no <size>")
        objects = []
        for element in root.iter("object"):
            box = element.find("bndbox")
            if box is None or not element.findtext("name"):
                raise ValueError("an <object> lacks <name> or <bndbox>")
            x0, y0, x1, y1 = (number(box, k) for k in ("xmin", "ymin", "xmax", "ymax"))
            name, difficult = element.findtext("name").strip(), element.findtext("difficult")
            bbox = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
            objects.append({"name": name, "difficult": int(difficult or 0), "bbox": bbox})
        return {
            "file_name": root.findtext("filename"),
            "width": int(number(size, "width")),
            "height": int(number(size, "height")),
            "objects": objects,
        }
    except (OSError, ValueError, ElementTree.ParseError) as e:
        raise InputError(f"{path}: {one_line(e)}") from e


def find_image(folder: Path, stem: str, file_name: Optional[str]) -> str:
    """Name of the image in ``folder`` for ``stem``.xml; raises InputError if there is none."""
    # <filename> may contain the path on another machine.
    named = Path((file_name or "").replace("\\", "/")).name
    for name in (*(stem + suffix for suffix in (".jpg", ".png", ".jpeg", ".JPG")), named):
        if name and (folder / name).is_file():
            return name
    raise InputError(f"{folder / stem}.*: there is no image for {stem}.xml")


def convert(
    annotations: Path, images: Path, stems: List[str], classes: Optional[List[str]]
) -> Dict[str, List]:
    """
    The content of a COCO JSON for the XML files with these stems.

    Raises:
        InputError: if a file is missing or broken, or has an object of none of ``classes``.
    """
    records = {stem: read_xml(annotations / f"{stem}.xml") for stem in tqdm(stems, unit="file")}
    found = {o["name"] for record in records.values() for o in record["objects"]}
    names = classes or sorted(found)
    if found - set(names):
        raise InputError(f"--classes: {sorted(found - set(names))} in {annotations} are not named")
    ids = {name: i for i, name in enumerate(names, 1)}
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    dataset = {"images": [], "annotations": [], "categories": categories}
    for image_id, (stem, record) in enumerate(records.items(), 1):
        name = find_image(images, stem, record["file_name"])
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
    annotations = Path(args.annotations)
    if args.list:
        try:
            # VOC's lists of a single class have a second column.
            lines = Path(args.list).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"--list: {args.list}: {one_line(e)}") from e
        stems = [line.split()[0] for line in lines if line.strip()]
    else:
        stems = sorted(path.stem for path in annotations.glob("*.xml"))
    if not stems:
        raise InputError(f"--annotations: {annotations}: there are no XML files")
    dataset = convert(annotations, Path(args.images), stems, args.classes)
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    with atomic_write(args.output, "w") as f:
        json.dump(dataset, f)
    print(f"{args.output}: {len(dataset['images'])} images, {len(dataset['annotations'])} objects")


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
