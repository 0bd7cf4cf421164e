#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""
Detect objects with an ONNX file of tools/export_model.py and draw them. Needs onnxruntime, NumPy
and Pillow; also OpenCV if the model was trained with its resizing.

    python demo/onnx_demo.py model.onnx image.jpg output.jpg
"""

import json
import sys

import numpy as np
from PIL import Image, ImageDraw


def main(model: str, source: str, target: str) -> None:
    """Detect objects in the image ``source`` and draw them into ``target``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    wanted, picture = about["input"], Image.open(source).convert("RGB")
    sides = wanted["shorter_side"], wanted["longer_side_at_most"]
    scale = min(sides[0] / min(picture.size), sides[1] / max(picture.size))
    size = tuple(int(side * scale + 0.5) for side in picture.size)
    if wanted["interpolation"] == "opencv":
        import cv2

        resized = cv2.resize(np.asarray(picture), size, interpolation=cv2.INTER_LINEAR)
    else:
        resized = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    image = resized[:, :, ::-1] if wanted["format"] == "BGR" else resized
    boxes, classes, scores = session.run(
        None, {"image": np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)}
    )[:3]
    draw = ImageDraw.Draw(picture)
    for box, index, score in zip(boxes / scale, classes, scores):
        if score >= 0.5:
            draw.rectangle(box.tolist(), outline="red", width=2)
            draw.text(box[:2].tolist(), f"{about['classes'][index]} {score:.0%}", fill="red")
    picture.save(target)
    print(f"{(scores >= 0.5).sum()} objects: {target}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
