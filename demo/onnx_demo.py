#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Detect objects with an ONNX file written by tools/export_model.py and draw them. This program needs
onnxruntime, NumPy and Pillow, and OpenCV if the model was trained with images resized by OpenCV.

    python demo/onnx_demo.py model.onnx image.jpg output.jpg
"""

import argparse
import io
import json
import os
import sys
from contextlib import contextmanager, suppress
from typing import Any, Dict, Iterator, List, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """End the program with one line about ``what`` and exit status 2 if the body fails."""
    try:
        yield
    except Exception as e:  # a file that is not what its name says can fail in any way
        reason = " ".join(str(getattr(e, "strerror", None) or e).split())
        print(f"error: {what}: {reason or type(e).__name__}", file=sys.stderr)
        sys.exit(2)


def check_output(path: str, *inputs: str) -> str:
    """The format of a picture that can be written to ``path``. Raises: ValueError, OSError."""
    Image.init()
    format = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    if format not in Image.SAVE:
        raise ValueError("no suffix of a picture, such as .jpg or .png")
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise ValueError("no file")
        if any(os.path.exists(x) and os.path.samefile(x, path) for x in inputs):
            raise ValueError("an input, which would be overwritten; name another file")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    return format


def load(path: str) -> Tuple[Any, Dict[str, Any]]:
    """An onnxruntime session, and what the metadata say about the model: "input", "classes"."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    with open(path, "rb") as f:
        content = f.read()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    if not {"input", "classes"} <= about.keys():
        raise ValueError("not written by tools/export_model.py")
    about = {key: json.loads(about[key]) for key in ("input", "classes")}
    if about["input"]["names"] != ["image"]:
        raise ValueError("a model without RPN needs proposals; an image alone is not enough")
    if about["input"]["shorter_side"] is None:
        raise ValueError(
            "it does not say how images are resized, which its training had own code for"
        )
    return session, about


def read(path: str) -> Image.Image:
    """A picture, upright, in RGB; 16 bits are scaled to 8. Raises: ValueError, OSError."""
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode == "F":
        raise ValueError("floating point pixels: save it with 8 bits per channel")
    if picture.mode.startswith("I"):
        gray = np.asarray(picture).astype(np.float32) / 257
        picture = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")


def resize(picture: Image.Image, wanted: Dict[str, Any]) -> Tuple[np.ndarray, float]:
    """
    The input of a model for a picture, (3, H, W), and the factor that its sides grow by, which is 1
    if the model wants a shorter side of 0.
    """
    sides = wanted["shorter_side"], wanted["longer_side_at_most"]
    scale = min(sides[0] / min(picture.size), sides[1] / max(picture.size)) if sides[0] else 1.0
    size = tuple(int(side * scale + 0.5) for side in picture.size)
    if wanted["interpolation"] == "opencv":
        import cv2

        resized = cv2.resize(np.asarray(picture), size, interpolation=cv2.INTER_LINEAR)
    else:
        resized = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    image = resized[:, :, ::-1] if wanted["format"] == "BGR" else resized
    return np.ascontiguousarray(image.transpose(2, 0, 1), np.float32), scale


def draw_objects(
    picture: Image.Image, boxes: np.ndarray, names: List[str], scores: np.ndarray
) -> None:
    """Draw boxes, (n, 4), absolute XYXY, with their names and scores, (n,)."""
    draw = ImageDraw.Draw(picture)
    for box, name, score in zip(boxes, names, scores):
        draw.rectangle(box.tolist(), outline="red", width=2)
        draw.text(box[:2].tolist(), f"{name} {score:.0%}", fill="red")


def write(path: str, content: bytes) -> None:
    """Write a file, which stays as it was if that fails. Raises: OSError."""
    unfinished = os.path.join(os.path.dirname(path), f".{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as f:
            f.write(content)
        os.replace(unfinished, path)
    finally:
        with suppress(OSError):
            os.remove(unfinished)


def main(argv=None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="ONNX file written by tools/export_model.py")
    parser.add_argument("image")
    parser.add_argument("output", help="picture to write; an existing file is replaced")
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names are any text
    with explaining(args.output):
        format = check_output(args.output, args.model, args.image)
    with explaining(args.model):
        session, about = load(args.model)
    with explaining(args.image):
        picture = read(args.image)
        image, scale = resize(picture, about["input"])
    with explaining(args.model):
        boxes, classes, scores = session.run(None, {"image": image})[:3]
        sure = scores >= 0.5
        names = [about["classes"][index] for index in classes[sure]]
    with explaining(args.output):
        draw_objects(picture, boxes[sure] / scale, names, scores[sure])
        content = io.BytesIO()
        picture.save(content, format)
        write(args.output, content.getvalue())
    print(f"{sure.sum()} objects: {args.output}")


if __name__ == "__main__":
    main()
