# SPDX-License-Identifier: Apache-2.0
"""Detections as arrays, their files, and evaluations in several processes."""

import json
import pickle
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from torch import multiprocessing

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances

from libra_d2.errors import InputError
from libra_d2.evaluation import LibraCOCOEvaluator, detections
from libra_d2.evaluation.detections import Detections, write_predictions, write_results_json

IMAGE_IDS = [7, 2, 5, 4, 11, 6]


def found_in(image_id, kind="boxes", num=3):
    """Detections of two classes, with boxes that float32 cannot tell from doubles."""
    rng = torch.Generator().manual_seed(IMAGE_IDS.index(image_id))
    instances = Instances((40, 50))
    boxes = 20 * torch.rand(num, 4, generator=rng)
    boxes[:, 2:] += boxes[:, :2] + 2
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.rand(num, generator=rng)
    instances.pred_classes = torch.arange(num) % (1 if kind == "keypoints" else 2)
    if kind == "masks":
        instances.pred_masks = torch.rand(num, 40, 50, generator=rng) < 0.3
    if kind == "keypoints":
        instances.pred_keypoints = 40 * torch.rand(num, 17, 3, generator=rng)
    return instances


def as_results(image_id, *args):
    return instances_to_coco_json(found_in(image_id, *args), image_id)


@pytest.mark.parametrize("kind", ["boxes", "masks", "keypoints", "doubles"])
def test_files(tmp_path, kind):
    """Both files have just what went in, also of images without detections."""
    results = {i: as_results(i, kind, num) for i, num in zip(IMAGE_IDS, (0, 3, 2, 0, 1))}
    if kind == "doubles":
        results[2][0]["score"] = 0.1
    images = [Detections(i, x) for i, x in results.items()]
    assert [list(x) for x in images] == list(results.values())
    assert [len(x) for x in images] == [0, 3, 2, 0, 1]
    assert [x[-1] for x in images if x] == [x[-1] for x in results.values() if x]
    assert images[1].scores.tolist() == [x["score"] for x in results[2]]
    path = str(tmp_path / "predictions.pth")
    write_predictions(path, [{"image_id": x.image_id, "instances": x} for x in images])
    expected = [{"image_id": i, "instances": x} for i, x in results.items()]
    assert torch.load(path, weights_only=True) == expected
    with ZipFile(path) as archive:
        assert archive.getinfo("archive/data.pkl").extract_version == 45  # may exceed 4 GiB
    for some in (images, images[:1]):
        write_results_json(str(tmp_path / "results.json"), some, ["x", "y"])
        every = [{**x, "category_id": "xy"[x["category_id"]]} for image in some for x in image]
        assert (tmp_path / "results.json").read_text() == json.dumps(every)
    write_predictions(path, [{"image_id": 2, "proposals": found_in(2)}])
    (one,) = torch.load(path, weights_only=False)
    assert torch.equal(one["proposals"].scores, found_in(2).scores)
    assert len(list(tmp_path.iterdir())) == 2


def test_size():
    """24 bytes for each detection, and those of its mask."""
    boxes = [pickle.dumps(Detections(2, as_results(2, "boxes", num))) for num in (0, 1000)]
    assert len(boxes[1]) - len(boxes[0]) == pytest.approx(24 * 1000, abs=100)
    results = as_results(2, "masks", 100)
    masks = sum(len(x["segmentation"]["counts"]) + 8 for x in results)
    size = len(pickle.dumps(Detections(2, results))) - len(boxes[0])
    assert size == pytest.approx(24 * 100 + masks, abs=300)


@pytest.fixture
def dataset(tmp_path):
    """Registers the detections of each image, moved by a pixel, as objects."""

    def register(kind="boxes", **changes):
        name = f"test_detections_{kind}"
        objects = [x for i in IMAGE_IDS for x in as_results(i, kind)]
        for number, x in enumerate(objects, 1):
            x.update(id=number, iscrowd=0, area=x["bbox"][2] * x["bbox"][3])
            x["bbox"][0] += 1
            if kind == "keypoints":
                x["keypoints"][2::3] = 17 * [2]
                x["num_keypoints"] = 17
        images = [{"id": i, "height": 40, "width": 50} for i in IMAGE_IDS]
        content = {"images": images, "annotations": objects}
        content["categories"] = [{"id": 0}, {"id": 1}][: 1 if kind == "keypoints" else 2]
        content.update(changes)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        MetadataCatalog.pop(name, None)
        classes = {x["id"]: x["id"] for x in content["categories"]}
        MetadataCatalog.get(name).set(
            json_file=str(path), thing_dataset_id_to_contiguous_id=classes
        )
        return name

    return register


def process(evaluator, image_ids, kind="boxes"):
    evaluator.reset()
    for i in image_ids:
        evaluator.process([{"image_id": i}], [{"instances": found_in(i, kind)}])


def test_keypoints(dataset, tmp_path):
    """The numbers and the files of Detectron2's evaluator."""
    name, results, files = dataset("keypoints"), [], []
    for evaluator in (COCOEvaluator, LibraCOCOEvaluator):
        out = tmp_path / evaluator.__name__
        ours = evaluator(name, None, False, str(out))
        process(ours, IMAGE_IDS, "keypoints")
        results.append(ours.evaluate())
        files.append((out / "coco_instances_results.json").read_text())
    assert results[0]["keypoints"]["AP"] > 5
    assert results[1].keys() == {"bbox", "keypoints"}
    for task, numbers in results[0].items():
        assert results[1][task] == pytest.approx(numbers, nan_ok=True)
    assert files[0] == files[1]


def test_without_annotations(dataset, tmp_path):
    """The files are written, and there are no results."""
    evaluator = LibraCOCOEvaluator(dataset(annotations=None), None, False, str(tmp_path / "out"))
    process(evaluator, IMAGE_IDS[:2])
    assert evaluator.evaluate() == {}
    written = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    assert written == [x for i in IMAGE_IDS[:2] for x in as_results(i)]
    assert len(torch.load(tmp_path / "out/instances_predictions.pth")) == 2


def evaluate_part(rank, parts, name, folder):
    """One of several processes, which evaluates its part of the images."""
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=len(parts)
    )
    evaluator = LibraCOCOEvaluator(name, output_dir=str(folder / "out"))
    process(evaluator, parts[rank])
    (folder / f"{rank}.json").write_text(json.dumps(evaluator.evaluate()))
    assert hasattr(evaluator, "_coco_api") == (rank == 0)  # others do not read the dataset


@pytest.mark.parametrize("parts", [[IMAGE_IDS[:3], IMAGE_IDS[3:5], IMAGE_IDS[5:]], [[], IMAGE_IDS]])
def test_processes(dataset, tmp_path, monkeypatch, parts):
    """The main process has the results and files of one process, also of unequal parts."""
    name, found, files = dataset(), [], []
    one = LibraCOCOEvaluator(name, None, False, str(tmp_path / "one"))
    process(one, IMAGE_IDS)
    expected = one.evaluate()
    assert expected["bbox"]["AP50"] > 5
    monkeypatch.setattr(detections, "_IMAGES_AT_ONCE", 2)
    arguments = (parts, name, tmp_path)
    multiprocessing.start_processes(evaluate_part, arguments, len(parts), start_method="fork")
    results = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(len(parts))]
    assert results[0]["bbox"] == pytest.approx(expected["bbox"], abs=1e-10, nan_ok=True)
    assert results[1:] == [{} for _ in parts[1:]]
    for folder in (tmp_path / "one", tmp_path / "out"):
        found.append(torch.load(folder / "instances_predictions.pth"))
        files.append({x.name: x.read_text() for x in folder.iterdir() if x.suffix != ".pth"})
    assert found[0] == found[1]
    assert [x["image_id"] for x in found[0]] == IMAGE_IDS
    assert files[0] == files[1]
    assert list(files[0]) == ["coco_instances_results.json"]


def note_error(rank, name, folder):
    """One of two processes, neither of which can build the evaluator."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    with pytest.raises((FileNotFoundError, InputError)) as error:
        LibraCOCOEvaluator(name, output_dir=str(folder))
    (folder / f"{rank}.txt").write_text(str(error.value))


def test_error_in_the_main_process(dataset, tmp_path):
    """It is one of all processes; none waits for another."""
    name = dataset()
    file = Path(MetadataCatalog.get(name).json_file)
    file.unlink()
    multiprocessing.start_processes(note_error, (name, tmp_path), 2, start_method="fork")
    assert all(str(file) in (tmp_path / f"{rank}.txt").read_text() for rank in range(2))
