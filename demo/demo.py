#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
r"""
Detect objects in images, a video or a webcam and draw them, like Detectron2's demo.

    python demo/demo.py --config-file config.yaml --input a.jpg images/ 'more/*.png' \
        --output out --opts MODEL.WEIGHTS model_final.pth

--config-file is a file or the name of a config in the model zoo, such as
COCO-Detection/libra_faster_rcnn_R_50_FPN_1x.yaml. A config of the model zoo uses its published
weights unless you set MODEL.WEIGHTS. With --plain-weights, each picture shows the detections of a
plain detector beside those of Libra R-CNN, and objects that only one of them found are marked.
"""

import argparse
import glob
import logging
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from detectron2.data import Metadata
from detectron2.utils.logger import setup_logger

from libra_d2 import model_zoo
from libra_d2.config import VARIANTS, Recipe
from libra_d2.data import read_image
from libra_d2.data.coco_json import read_categories
from libra_d2.data.image_reading import IMAGE_SUFFIXES
from libra_d2.engine import LibraPredictor, argument_parser, read_config, report_errors
from libra_d2.errors import InputError, counted
from libra_d2.evaluation.pictures import picture_scale
from libra_d2.evaluation.side_by_side import draw_side_by_side
from libra_d2.utils.atomic_write import UNFINISHED, atomic_write
from libra_d2.utils.display import display_metadata
from libra_d2.utils.meter import Meter
from libra_d2.utils.output_path import output_paths

logger = logging.getLogger("libra_d2.demo")


def build_argument_parser() -> argparse.ArgumentParser:
    """The command line arguments."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE or NAME",
        help="a file, or a name in the model zoo",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="images, folders of images, or patterns")
    source.add_argument("--video-input", metavar="FILE")
    source.add_argument("--webcam", action="store_true")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="folder, or file for one image or a video (.mp4). Default: show a window",
    )
    parser.add_argument(
        "--benchmark",
        action="store_true",
        help="measure the time for the first image of --input instead of drawing",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        help="lowest score of a detection, in [0, 1]; default: %(default)s",
    )
    parser.add_argument(
        "--categories",
        metavar="FILE",
        help="COCO JSON with the names of the classes, for a checkpoint that does not have them",
    )
    plain = parser.add_argument_group("comparison with a plain detector (images only)")
    plain.add_argument("--plain-weights", metavar="FILE", help="weights of the plain detector")
    plain.add_argument(
        "--plain-config-file",
        metavar="FILE",
        help="its config; default: --config-file without the ideas of Libra R-CNN",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        help="KEY VALUE pairs that override the config; key=value for a LazyConfig",
    )
    return parser


def find_images(inputs: List[str]) -> List[str]:
    """
    The images that paths, folders and glob patterns match, each once.

    Raises:
        InputError: if one of them matches none.
    """
    files = []
    for name in inputs:
        name = os.path.expanduser(name)
        if os.path.isdir(name):
            try:
                names = sorted(os.listdir(name))
            except OSError as e:
                raise InputError(f"--input: {name}: {e.strerror}") from e
            found = [os.path.join(name, x) for x in names if x.lower().endswith(IMAGE_SUFFIXES)]
            others = [x for x in names if not x.lower().endswith(IMAGE_SUFFIXES)]
            skipped = [x for x in others if x[0] != "." and os.path.isfile(os.path.join(name, x))]
            if skipped:
                number = counted(len(skipped), "file")
                logger.info(
                    f"{name}: skipped {number} without the suffix of an image: {skipped[0]}"
                )
        else:
            found = [name] if os.path.isfile(name) else sorted(glob.glob(name))
        if not found:
            raise InputError(f"--input: {name}: no such image, or a folder without images")
        files += found
    return [*{os.path.abspath(path): path for path in files}.values()]


def make_predictor(recipe: Recipe, names: Optional[List[str]]) -> LibraPredictor:
    """The predictor of a recipe; its number of classes follows from ``names``, if given."""
    if names:
        recipe.num_classes = len(names)
    if recipe.needs_proposals:
        raise InputError("a model without RPN needs proposals; images alone are not enough")
    return LibraPredictor(recipe)


def find_weights(name: str) -> str:
    """
    The published weights of a config of this model zoo or of Detectron2's.

    Raises:
        InputError: if there are none.
    """
    with suppress(RuntimeError):
        return model_zoo.get_checkpoint_url(name)
    from detectron2 import model_zoo as detectron2_zoo  # needs setuptools

    with suppress(RuntimeError):
        return detectron2_zoo.get_checkpoint_url(name)
    raise InputError(
        f"--config-file: {name} has no published weights; name some with MODEL.WEIGHTS"
    )


def setup(
    args: argparse.Namespace, config_file: str, opts: List[str], plain_weights: str = ""
) -> Recipe:
    """The recipe of the detector, or of the plain detector if ``plain_weights`` are given."""
    name = config_file if config_file.endswith((".yaml", ".py")) else f"{config_file}.yaml"
    in_zoo = not os.path.exists(config_file)
    path = name if in_zoo else config_file
    recipe = read_config(path, opts)
    if plain_weights and not args.plain_config_file:
        recipe = read_config(path, [*opts, *recipe.variant_options(VARIANTS["baseline"])])
    weights_are_named = any(x.split("=")[0] == recipe.name_of("weights") for x in opts)
    if plain_weights:
        recipe.weights = plain_weights
    elif in_zoo and not weights_are_named:
        recipe.weights = find_weights(name)
    recipe.score_threshold = args.confidence_threshold
    return recipe


def picture_paths(files: List[str], output: str) -> List[str]:
    """
    Where to write the picture of each image: ``output``, if it names a picture and there is one
    image; or in that folder, under the name of the image. Images of the same name from several
    folders keep their path from the folder that is common to all.
    """
    if len(files) == 1 and output.lower().endswith(IMAGE_SUFFIXES) and not os.path.isdir(output):
        return [output]
    # Formats that can only be read have PNG pictures.
    targets = {x: x if x.lower().endswith(IMAGE_SUFFIXES) else f"{x}.png" for x in files}
    targets = {os.path.abspath(x): os.path.abspath(target) for x, target in targets.items()}
    names = {x: os.path.basename(target) for x, target in targets.items()}
    if len(set(names.values())) < len(names):
        folder = os.path.commonpath([os.path.dirname(x) for x in targets])
        names = {x: os.path.relpath(target, folder) for x, target in targets.items()}
    return [os.path.join(output, names[os.path.abspath(x)]) for x in files]


def process_images(
    files: List[str],
    outputs: Optional[List[str]],
    draw: Callable[[np.ndarray], Tuple[np.ndarray, int]],
) -> None:
    """
    Save a picture of each image in ``outputs``, or show it. ``draw`` returns it for a BGR image,
    together with the number of detections.

    Raises:
        InputError: at the end, if some images could not be read.
    """
    unreadable = []
    for i, path in enumerate(tqdm(files, unit="image", disable=not outputs)):
        try:
            image = read_image(path, format="BGR")
        except InputError as e:
            unreadable.append(str(e))
            continue
        picture, num_detections = draw(image)
        logger.info(f"{path}: {counted(num_detections, 'object')}")
        if outputs:
            suffix = os.path.splitext(outputs[i])[1].lower()
            with atomic_write(outputs[i]) as f:
                Image.fromarray(picture).save(f, Image.registered_extensions()[suffix])
        elif not show(picture, path, wait=0):
            break
    if unreadable:
        raise InputError(
            f"{len(unreadable)} of {len(files)} images cannot be read: {unreadable[0]}"
        )


def show(picture: np.ndarray, title: str, wait: int) -> bool:
    """
    Show a picture, (H, W, 3) uint8 RGB, in a window for ``wait`` milliseconds, or until a key is
    pressed if it is 0.

    Returns:
        False if Escape was pressed.

    Raises:
        InputError: if OpenCV cannot open windows.
    """
    import cv2

    try:
        cv2.imshow(title, picture[:, :, ::-1])
        return cv2.waitKey(wait) != 27
    except cv2.error as e:
        raise InputError(
            "there is no window to show pictures in (OpenCV is headless): use --output"
        ) from e


def read_frames(source) -> Iterator[np.ndarray]:
    """BGR frames of an open cv2.VideoCapture."""
    success, frame = source.read()
    while success:
        yield frame
        success, frame = source.read()


def open_video(args: argparse.Namespace):
    """Open the video file or webcam. Raises: InputError: if that fails."""
    import cv2

    source = cv2.VideoCapture(0 if args.webcam else args.video_input)
    if not source.isOpened():
        name = "--webcam" if args.webcam else f"--video-input: {args.video_input}"
        raise InputError(f"{name}: not a video that OpenCV can read")
    return source


def video_path(args: argparse.Namespace) -> str:
    """Where to write the video: ``--output``, or in that folder, under the name of the source."""
    if not os.path.isdir(args.output) and os.path.splitext(args.output)[1]:
        return args.output
    name = "webcam" if args.webcam else Path(args.video_input).stem
    return os.path.join(args.output, f"{name}.mp4")


class VideoFile:
    """A video that is written frame by frame, and appears at ``path`` when it is finished."""

    def __init__(self, path: str, rate: float, size: Tuple[int, int]):
        """
        Args:
            path: with the suffix .mp4.
            rate: frames per second.
            size: (width, height) of the frames, in pixels.

        Raises:
            InputError: if OpenCV cannot write it.
        """
        import cv2

        self.path, self.num_frames = path, 0
        folder, suffix = os.path.dirname(path), os.path.splitext(path)[1]
        self._unfinished = os.path.join(folder, f".{os.getpid()}{UNFINISHED}{suffix}")
        codec = cv2.VideoWriter_fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(self._unfinished, codec, rate, size)
        if not self._writer.isOpened():
            raise InputError(f"--output: {path}: OpenCV cannot write this; use an .mp4")

    def write(self, picture: np.ndarray) -> None:
        """Append a picture, (H, W, 3) uint8 RGB."""
        self._writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
        self.num_frames += 1

    def finish(self) -> None:
        """Raises: InputError: if not all frames can be read again; OpenCV does not say why."""
        import cv2

        self._writer.release()
        source, number = cv2.VideoCapture(self._unfinished), 0
        while source.grab():
            number += 1
        source.release()
        try:
            if number < self.num_frames:
                lost = f"{number} of {self.num_frames} frames could be written"
                raise InputError(f"--output: {self.path}: {lost}: is it an .mp4, or the disk full?")
            os.replace(self._unfinished, self.path)
        finally:
            with suppress(OSError):
                os.remove(self._unfinished)


def process_video(
    source, name: str, path: str, predictor: LibraPredictor, metadata: Metadata
) -> None:
    """
    Draw the detections in each frame of an open cv2.VideoCapture. Write the video to ``path``, or
    show it if that is "". What was drawn is kept if this ends early, as a webcam does with Ctrl-C.

    Raises:
        InputError: if it has no frames, or the file cannot be written.
    """
    import cv2

    from detectron2.utils.video_visualizer import VideoVisualizer

    visualizer, video, num_frames = VideoVisualizer(metadata), None, 0
    total = int(source.get(cv2.CAP_PROP_FRAME_COUNT))
    try:
        for frame in tqdm(read_frames(source), unit="frame", total=total if total > 0 else None):
            instances = predictor(frame)["instances"].to("cpu")
            picture = visualizer.draw_instance_predictions(frame[:, :, ::-1], instances).get_image()
            num_frames += 1
            if not path:
                if not show(picture, name, wait=1):
                    break
                continue
            if video is None:
                rate = source.get(cv2.CAP_PROP_FPS) or 25
                video = VideoFile(path, rate, picture.shape[1::-1])
            video.write(picture)
    finally:
        source.release()
        if video is not None:
            video.finish()
    if num_frames == 0:
        raise InputError(f"{name}: it has no frames")
    if path:
        print(path)


def measure(path: str, predictors: Dict[str, LibraPredictor], recipe: Recipe) -> None:
    """Print the median time of each detector for an image, resizing included, in turn."""
    image = read_image(path, format="BGR")
    steps = {name: partial(predictor, image) for name, predictor in predictors.items()}
    result = Meter(recipe.device_type, seconds=10).times(path, steps)
    size, precision = f"{image.shape[1]} x {image.shape[0]}", str(recipe.precision)[6:]
    threads = f" with {torch.get_num_threads()} threads" if recipe.device_type == "cpu" else ""
    print(f"{path}: {size} pixels, {precision}, {recipe.device}{threads}")
    for name, time in result.values.items():
        spread, rate = result.spreads[name] / 2, 1000 / time
        print(f"{name}: {time:.1f} ± {spread:.1f} ms for an image, {rate:.1f} images per second")


def prepare_outputs(args: argparse.Namespace, recipe: Recipe, files: List[str]) -> List[str]:
    """
    The paths of all pictures of ``files``, or of the video; their folders are made.

    Raises:
        InputError: if one of them cannot be written, or is an input.
    """
    outputs = picture_paths(files, args.output) if files else [video_path(args)]
    inputs = {
        "--input": files,
        "--video-input": args.video_input,
        "--config-file": args.config_file,
        "--categories": args.categories,
        "--plain-weights": args.plain_weights,
        "--plain-config-file": args.plain_config_file,
        recipe.name_of("weights"): recipe.weights,
    }
    return output_paths("--output", outputs, inputs)


def run(args: argparse.Namespace) -> None:
    """Build the detectors and process the input."""
    setup_logger(name="libra_d2", abbrev_name="libra_d2")
    setup_logger(name="fvcore")
    if not 0 <= args.confidence_threshold <= 1:
        raise InputError(
            f"--confidence-threshold is {args.confidence_threshold}: use a value in [0, 1]"
        )
    if args.plain_weights and not args.input:
        raise InputError("--plain-weights: two detectors side by side need --input")
    if args.benchmark and not args.input:
        raise InputError("--benchmark needs --input")
    if args.plain_config_file and not args.plain_weights:
        raise InputError("--plain-config-file goes with --plain-weights")
    files, source = (find_images(args.input), None) if args.input else ([], open_video(args))
    recipe = setup(args, args.config_file, args.opts)
    outputs = prepare_outputs(args, recipe, files) if args.output and not args.benchmark else None
    names = read_categories(args.categories) if args.categories else None
    predictor = make_predictor(recipe, names)
    metadata = display_metadata(Metadata(thing_classes=names) if names else predictor.metadata)
    if source:
        name = "webcam" if args.webcam else args.video_input
        process_video(source, name, outputs[0] if outputs else "", predictor, metadata)
        return
    if args.plain_weights:
        file = args.plain_config_file or args.config_file
        plain = make_predictor(setup(args, file, args.opts, args.plain_weights), names)
    if args.benchmark:
        predictors = {"detector": predictor}
        if args.plain_weights:
            predictors["plain detector"] = plain
        measure(files[0], predictors, recipe)
        return
    if args.plain_weights:

        def draw(image):
            found = [p(image)["instances"].to("cpu") for p in (plain, predictor)]
            return draw_side_by_side(image[:, :, ::-1], metadata, found), len(found[1])

    else:
        from detectron2.utils.visualizer import ColorMode, Visualizer

        def draw(image):
            found = predictor(image)["instances"].to("cpu")
            scale = picture_scale(image, 640)
            visualizer = Visualizer(image[:, :, ::-1], metadata, scale, ColorMode.SEGMENTATION)
            return visualizer.draw_instance_predictions(found).get_image(), len(found)

    process_images(files, outputs, draw)


def main(argv=None) -> None:
    """Command line entry point."""
    report_errors(run, build_argument_parser().parse_args(argv))


if __name__ == "__main__":
    main()
