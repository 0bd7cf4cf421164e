# SPDX-License-Identifier: Apache-2.0
"""Datasets of a few small images, whose records are Detectron2's."""

import copy
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import types

import numpy as np
import pycocotools.mask as mask_utils
import pytest
import torch
from test_coco_json import DATASET, RUN_LENGTHS, check_files, folder, write  # noqa: F401

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.data.samplers import RepeatFactorTrainingSampler

from libra_d2.data import (
    cache_registered,
    dataset_cache,
    image_checks,
    load_dataset,
    load_records,
    mapped_records,
    outline,
    register_coco_json,
    use_cached,
)
from libra_d2.data.mapped_records import MappedRecords, RecordWriter
from libra_d2.errors import InputError

setup = importlib.import_module("libra_d2.engine.setup")  # not the function of this name
NAME = "test_cache"
POLYGONS = [[10, 20.5, 40, 20, 40, 60], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]
KEYPOINTS = [1, 2, 2, 3, 4, 0, 5.5, 6, 1]
COMPRESSED = {"size": [80, 100], "counts": mask_utils.frPyObjects(RUN_LENGTHS, 80, 100)["counts"]}
COMPRESSED["counts"] = COMPRESSED["counts"].decode()
OBJECTS = [  # image, class, crowd, box, and more
    (9, 3, 0, [1, 2.5, 3, 1e-3], {"segmentation": POLYGONS}),
    (7, 20, 1, [0, 0, 100, 80], {"segmentation": RUN_LENGTHS}),
    (9, 20, 0, [4, 5, 6, 7], {"keypoints": KEYPOINTS, "segmentation": POLYGONS[:1]}),
    (7, 20, 1, [0, 0, 9, 8], {"segmentation": COMPRESSED}),
    (9, 3, 0, [3, 2, 1, 1], {"segmentation": POLYGONS[1:]}),  # left out by Detectron2
]


def dataset():
    """Five objects of two images, of which only the second has others than crowds."""
    annotations = [
        {"id": i, "image_id": image, "category_id": category, "iscrowd": crowd, "bbox": box, **more}
        for i, (image, category, crowd, box, more) in enumerate(OBJECTS, 1)
    ]
    for annotation in annotations:
        annotation["area"] = 1
    images = [{**DATASET["images"][1], "file_name": "./b.png"}, DATASET["images"][0]]
    return {**DATASET, "images": images, "annotations": annotations}


def register(folder, content=None, **options):  # noqa: F811
    path = write(folder, content or dataset())
    register_coco_json(NAME, path, str(folder), str(folder / "cache"), **options)
    return load_records(NAME)


def as_text(records):
    """With compressed masks, whose counts are bytes or text, as text."""
    return json.loads(json.dumps(list(records), default=bytes.decode))


def cached_files(folder):  # noqa: F811
    return {path.suffix: path for path in (folder / "cache").iterdir()}


@pytest.mark.parametrize("mask_format", [None, "bitmask"])
@pytest.mark.parametrize("order", itertools.permutations(DATASET))
def test_records(folder, order, mask_format):  # noqa: F811
    """Detectron2's, in its order, whatever the order of the lists; boxes only, or with masks."""
    content = {key: dataset()[key] for key in order}
    if mask_format:
        content["annotations"][0]["segmentation"] = POLYGONS[:1]
        del content["annotations"][4]
    expected = load_coco_json(write(folder, content), str(folder), "test_cache_expected")
    assert [len(record["annotations"]) for record in expected] == [2, 2]
    records = register(folder, content, mask_format=mask_format)
    for annotation in itertools.chain(*(record["annotations"] for record in expected)):
        if not mask_format:
            annotation.pop("segmentation", None)
    assert as_text(records) == as_text(expected)
    assert list(map(list, records)) == list(map(list, expected))
    assert {type(a["bbox_mode"]) for r in records for a in r["annotations"]} == {
        type(expected[0]["annotations"][0]["bbox_mode"])
    }
    copied = pickle.loads(pickle.dumps(records))
    assert list(copied) == list(records) == DatasetCatalog.get(NAME)
    assert len(pickle.dumps(records)) < 500  # not the content
    records[0]["annotations"].clear()
    assert len(records[0]["annotations"]) == 2
    assert MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id == {3: 0, 20: 1}


def test_polygons_of_unsorted_annotations(folder):  # noqa: F811
    """Each object keeps its own, several and of any length, and their numbers."""
    content, polygons, objects = dataset(), POLYGONS[:1], []
    for i in range(1, 61):  # so many that an unstable sort would change their order
        polygons = [[i + j / 3 for j in range((6, 8, 10)[i % 3])], *polygons[:4]]
        changes = {"id": i, "image_id": (9, 7)[i % 2], "iscrowd": 0, "segmentation": polygons}
        objects.append({**content["annotations"][0], **changes})
    content["annotations"] = objects
    expected = load_coco_json(write(folder, content), str(folder), "test_cache_expected")
    assert [len(record["annotations"]) for record in expected] == [30, 30]
    assert as_text(register(folder, content, mask_format="polygon")) == as_text(expected)


def test_tuples_of_polygons(tmp_path):
    """As functions that are registered may return them; an image without objects."""
    writer, path = RecordWriter(), str(tmp_path / "a.records")
    writer.save(path, {})
    assert list(MappedRecords(path)) == []
    polygons = ((1, 2, 3, 4, 5.5, 6), [1, 2, 3, 4, 5, 6, 7, 8])
    annotation = {"bbox": [1, 2, 3, 4], "bbox_mode": 1, "category_id": 0, "segmentation": polygons}
    record = {"file_name": "a", "image_id": 1, "height": 2, "width": 3}
    writer.add_record({**record, "annotations": [annotation]})
    writer.add_record({**record, "image_id": 2, "annotations": []})
    writer.save(path, {})
    found, empty = MappedRecords(path)
    assert (empty["image_id"], empty["annotations"]) == (2, [])
    assert MappedRecords(path).num_objects().tolist() == [1, 0]
    assert found["annotations"][0]["segmentation"] == [list(x) for x in polygons]


def test_ids_of_text(folder):  # noqa: F811
    """Of images, categories and annotations."""
    content = json.loads(json.dumps(dataset()))
    for entry in (*content["images"], *content["categories"]):
        entry["id"] = str(entry["id"])
    for entry in content["annotations"]:
        entry.update({key: str(entry[key]) for key in ("id", "image_id", "category_id")})
    records = register(folder, content)
    assert [record["image_id"] for record in records] == ["7", "9"]
    assert [a["category_id"] for a in records[1]["annotations"]] == [1, 0]  # "20" before "3"
    ids = [a["id"] for a in json.loads(cached_files(folder)[".json"].read_text())["annotations"]]
    assert ids == [1, 2, 3, 4, 5]


def test_changed_file(folder, caplog):  # noqa: F811
    """All lists and other values are written, in whichever order they come; a warning says so."""
    content = {"annotations": dataset()["annotations"], "info": {"a": [1]}, **DATASET}
    empty = {**OBJECT, "id": 8, "bbox": [5, 5, 0, 9]}
    content["annotations"] = [*dataset()["annotations"], empty, {**OBJECT, "id": 9}]
    register(folder, content)
    found = json.loads(cached_files(folder)[".json"].read_text())
    content["annotations"].remove(empty)
    content["annotations"][-1]["bbox"] = [50, 0, 50, 80]
    assert found == content
    assert "clipped 1 box that extended beyond the image, and dropped 1 box without" in caplog.text


OBJECT = {"image_id": 7, "category_id": 3, "iscrowd": 0, "area": 2, "bbox": [50, -9, 60, 99]}


@pytest.fixture
def counts(monkeypatch):
    """How often the JSON is read, and which images are opened."""
    found = {"reads": 0, "opened": []}
    read, check = dataset_cache.COCOEntries.__iter__, image_checks._check_image

    def count_reads(self):
        found["reads"] += 1
        return read(self)

    def count_images(path, *args):
        found["opened"].append(os.path.basename(path))
        check(path, *args)

    monkeypatch.setattr(dataset_cache.COCOEntries, "__iter__", count_reads)
    monkeypatch.setattr(image_checks, "_check_image", count_images)
    return found


def test_read_once(folder, counts, monkeypatch):  # noqa: F811
    """The JSON and the images are read again only if they have changed."""

    def assert_read(reads, opened):
        counts.update(reads=0, opened=[])
        records = register(folder, content)
        assert (counts["reads"], sorted(counts["opened"])) == (reads, opened)
        assert len(cached_files(folder)) == len(list((folder / "cache").iterdir())) == 2
        return as_text(records)

    content = dataset()
    first = assert_read(1, ["a.png", "b.png"])
    assert assert_read(0, []) == first
    content["annotations"][0]["category_id"] = 20  # the file of the old JSON is removed
    assert assert_read(1, ["a.png", "b.png"]) != first
    fingerprint = MetadataCatalog.get(NAME).fingerprint
    os.utime(folder / "b.png", (1, 1))
    assert_read(0, ["b.png"])
    assert MetadataCatalog.get(NAME).fingerprint == fingerprint
    image_checks.Image.new("L", (60, 60)).save(folder / "b.png")
    os.utime(folder / "b.png", (1, 1))  # only its number of bytes is another one
    assert_read(0, ["b.png"])
    path, other = cached_files(folder)[".records"], io.BytesIO()
    for _ in mapped_records.LAYOUT:
        np.save(other, np.frombuffer(b"{}", np.uint8))
    for broken in (*(path.read_bytes()[:part] for part in (-7, 1, 0)), other.getvalue()):
        path.write_bytes(broken)
        assert_read(1, [])
    cached_files(folder)[".npy"].write_bytes(b"")
    assert_read(0, ["a.png", "b.png"])
    with monkeypatch.context() as patch:
        for name in ("LAYOUT", "__version__"):
            patch.setattr(dataset_cache, name, "another")
            assert_read(1, ["a.png", "b.png"])
    monkeypatch.setattr(image_checks, "_BATCH", 1)
    (folder / "b.png").write_bytes(b"no image")
    for opened in (["a.png", "b.png"], ["b.png"]):
        counts["opened"].clear()
        with pytest.raises(
            InputError, match=r"b.png: not a readable image \(it has no known image format\)$"
        ):
            register(folder)
        assert counts["opened"] == opened
    (folder / "b.png").unlink()
    with pytest.raises(InputError, match="b.png: no such image"):
        register(folder)


def test_what_a_file_depends_on(folder, counts):  # noqa: F811
    """Whether masks are kept; the images that are checked, and what they are resized to."""
    content = dataset()
    content["annotations"][0]["segmentation"] = POLYGONS[:1]
    del content["annotations"][4]
    assert "segmentation" not in register(folder, content, amount=1)[1]["annotations"][0]
    assert counts["opened"] == ["a.png"]
    assert "segmentation" in register(folder, content, mask_format="bitmask")[1]["annotations"][0]
    with pytest.raises(InputError, match="with A and B .9999, 100000."):
        register(folder, content, limits={"A and B": ((9999,), 10**5)})


def test_names_that_begin_alike(folder):  # noqa: F811
    """Files of earlier content are those of the same dataset."""
    path, cache = write(folder, dataset()), folder / "cache"
    for other in (f"{NAME}-2", f"{NAME}-photographs_2024"):
        register_coco_json(other, path, str(folder), str(cache))
    before = {*cache.iterdir()}
    register(folder)
    assert before <= {*cache.iterdir()}
    content = dataset()
    del content["annotations"][0]
    register_coco_json(f"{NAME}-2", write(folder, content), str(folder), str(cache))
    assert {x.name.split("-")[1] for x in before & {*cache.iterdir()}} == {"photographs_2024"}


def test_amount(tmp_path, counts, monkeypatch, capsys):
    """In equal distances, and those that were checked are not opened again, also after an error."""
    monkeypatch.setattr(image_checks, "_BATCH", 64)
    names = [f"{i}.png" for i in range(200)]
    for name in names[:-1]:
        image_checks.Image.new("L", (2, 3)).save(tmp_path / name)
    arguments = (names, np.full((200, 2), (2, 3)), str(tmp_path), "x.json")
    states = np.full((200, 2), -1)
    for amount, opened in ((0, []), (4, [0, 50, 100, 150]), (8, [25, 75, 125, 175])):
        counts["opened"].clear()
        check_files(*arguments, amount, states)
        assert sorted(counts["opened"], key=names.index) == [names[i] for i in opened]
        assert (states[opened, 0] > 0).all()
    (tmp_path / names[-1]).write_bytes(b"no image")
    for expected in (range(64), range(184, 200)):  # the batches before the broken one are kept
        counts["opened"].clear()
        with pytest.raises(InputError, match="199.png: not a readable image"):
            check_files(*arguments, -1, states)
        assert {names[i] for i in expected} - {names[i] for i in (0, 25, 50)} <= {*counts["opened"]}
    assert len(counts["opened"]) <= 64
    assert capsys.readouterr().err == ""  # no progress of what takes no time
    delayed = image_checks.tqdm
    monkeypatch.setattr(image_checks, "tqdm", lambda **x: delayed(**{**x, "delay": 0}))
    image_checks.Image.new("L", (2, 3)).save(tmp_path / names[-1])
    check_files(*arguments)
    assert re.search("checking images: 100%.* 200/200 .*image/s", capsys.readouterr().err)


def test_many_errors(tmp_path):
    """The first ten are named."""
    (tmp_path / "a.png").write_bytes(b"no image")
    for number, others in ((10, []), (11, ["and others"])):
        names = [f"{'./' * i}a.png" for i in range(number)]
        with pytest.raises(InputError) as error:
            check_files(names, np.ones((number, 2)), str(tmp_path), "x.json")
        paths = [f"{tmp_path}/{name}" for name in names[:10]]
        assert re.findall("([^ ]+): not a readable image", str(error.value)) == paths
        assert re.findall("; (and .*)", str(error.value)) == others


@pytest.mark.parametrize("is_parallel", [True, False])
def test_several_processes(tmp_path, monkeypatch, is_parallel):
    """The images before the first that is broken are known; processes end, and leave no trace."""
    check, log = image_checks._check_image, tmp_path / "log"

    def log_process(*args):
        with log.open("a") as f:
            f.write(f"{os.getpid()}\n")
        check(*args)

    monkeypatch.setattr(image_checks, "_check_image", log_process)
    monkeypatch.setattr(image_checks, "_BATCH", 2)
    monkeypatch.setattr(image_checks, "_MIN_PER_PROCESS", 4 if is_parallel else 10)
    monkeypatch.setattr(image_checks.os, "sched_getaffinity", lambda pid: range(2), raising=False)
    monkeypatch.setattr(image_checks.multiprocessing, "get_start_method", lambda: "fork")
    names = [f"{i}.png" for i in range(9)]
    for name in names:
        (tmp_path / name).write_bytes(b"no image")
    for width, name in enumerate(names[:6], 1):
        image_checks.Image.new("L", (width, 3)).save(tmp_path / name)
    states, sizes = np.full((9, 2), -1), np.stack([np.arange(1, 10), np.full(9, 3)], axis=1)
    random_state = torch.get_rng_state()
    with pytest.raises(InputError) as error:
        check_files(names, sizes, str(tmp_path), "x.json", -1, states)
    assert multiprocessing.active_children() == []
    found = re.findall(r"(\d.png): not a readable image", str(error.value))
    assert found == ["6.png", "7.png"]  # of one batch
    expected = [(os.stat(tmp_path / x).st_size, os.stat(tmp_path / x).st_mtime_ns) for x in names]
    assert states.tolist() == [*map(list, expected[:6]), *[[-1, -1]] * 3]
    assert torch.get_rng_state().equal(random_state)
    processes = {*map(int, log.read_text().split())}
    assert len(processes) == (2 if is_parallel else 1)
    assert (os.getpid() in processes) != is_parallel
    log.write_text("")  # nothing is opened again
    check_files(names[:6], sizes[:6], str(tmp_path), "x.json", -1, states[:6])
    assert log.read_text() == ""


def test_images_are_checked_while_annotations_are_read(folder, monkeypatch):  # noqa: F811
    """The processes begin before, and end after an error; a missing file is found at once."""
    monkeypatch.setattr(image_checks, "_num_processes", lambda *args: 1)
    entries, processes = dataset_cache.COCOEntries.__iter__, []

    def note_processes(self):
        for key, entry in entries(self):
            yield key, entry
            if key == "annotations":
                processes.append(len(multiprocessing.active_children()))

    monkeypatch.setattr(dataset_cache.COCOEntries, "__iter__", note_processes)
    content = copy.deepcopy(dataset())
    content["annotations"][2]["bbox"] = "broken"
    with pytest.raises(InputError, match="annotation id 3 has the bbox 'broken'") as error:
        register(folder, content)
    assert processes == [1, 1]
    assert multiprocessing.active_children() == []  # although there is the traceback
    del error
    content["images"][0]["file_name"] = "absent.jpg"
    with pytest.raises(InputError, match="absent.jpg: no such image; .* names it$"):
        register(folder, content)
    content["images"][1]["file_name"] = "absent too.jpg"
    for most, others in ((10, "absent.jpg"), (1, "...")):
        monkeypatch.setattr(image_checks, "_MAX_ERRORS", most)
        with pytest.raises(InputError) as error:
            register(folder, content)
        assert re.search("/absent too.jpg: no such image; .* names it ", str(error.value))
        assert str(error.value).endswith(f" names it (missing in all: 2; {others})")
    assert len(processes) == 2
    monkeypatch.setattr(image_checks, "_num_processes", lambda n, idle: told.append(idle) or 0)
    told = []
    for _ in range(2):
        register(folder)
    assert told == [False, True]


@pytest.mark.parametrize(
    ("method", "is_daemon", "cores", "num_images", "expected"),
    [
        *(("fork", False, 4, 40000, [4, 3]), ("fork", False, 4, 8000, [2, 2])),
        *(("fork", False, 4, 3999, [0, 0]), ("fork", False, 64, 10**6, [16, 16])),
        *(("fork", False, 17, 10**6, [16, 16]), ("fork", False, 1, 40000, [1, 1])),
        *(("fork", True, 4, 40000, [0, 0]), ("spawn", False, 4, 40000, [0, 0])),
    ],
)
def test_number_of_processes(method, is_daemon, cores, num_images, expected, monkeypatch):
    """
    None where they cannot be started, or would have to import everything; beside an idle process
    and a busy one.
    """
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)
    process = types.SimpleNamespace(daemon=is_daemon)
    monkeypatch.setattr(multiprocessing, "current_process", lambda: process)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    assert [image_checks._num_processes(num_images, x) for x in (True, False)] == expected


@pytest.mark.parametrize(
    ("options", "length"),
    [
        *(({}, 2), ({"filter_empty": False}, 4), ({"min_keypoints": 2}, 1)),
        ({"filter_empty": False, "min_keypoints": 1}, 2),
    ],
)
def test_load_dataset(folder, monkeypatch, options, length):  # noqa: F811
    """As Detectron2's function: filtered images, table of classes; and repeat factors."""
    register(folder)
    names, tables, content = [NAME, "test_cache_2"], [], dataset()
    del content["annotations"][0]
    content["annotations"][1]["keypoints"] = [1, 2, 2, 3, 4, 0, 5, 6, 0]  # one of them is visible
    path, others = write(folder, content), (str(folder), str(folder / "cache"))
    register_coco_json(names[1], path, *others)
    monkeypatch.setattr("detectron2.data.build.log_first_n", lambda *args, **_: tables.append(args))
    found, expected = (f(names, **options) for f in (load_dataset, get_detection_dataset_dicts))
    assert list(found) == expected
    assert len(expected) == length
    assert tables == tables[:1] * 2
    assert "#instances" in tables[0][1]
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    assert factors(outline(found), 0.9).tolist() == factors(expected, 0.9).tolist()
    assert outline(expected) is expected
    single = load_dataset(NAME)
    assert isinstance(single, MappedRecords)
    assert list(single) == list(load_records(NAME))[1:]
    assert list(single.select(np.ones(len(single.all_sizes), bool))) == list(single)
    assert list(pickle.loads(pickle.dumps(single))) == list(single)
    with pytest.raises(InputError, match=f"^{NAME}: no image has an object to train on"):
        load_dataset(NAME, min_keypoints=3)
    loaded = []
    DatasetCatalog.register("test_cache_list", lambda: loaded.append(1) or [{"annotations": []}])
    assert load_dataset("test_cache_list", filter_empty=False) == [{"annotations": []}]
    assert len(loaded) == 1
    with pytest.raises(AssertionError, match="No valid data"):
        load_dataset("test_cache_list", filter_empty=False, min_keypoints=1)
    assert load_dataset([NAME, "test_cache_list"], check_consistency=False) == list(single)
    DatasetCatalog.remove("test_cache_list")
    content["categories"] = [{**x, "name": x["name"] * 2} for x in content["categories"]]
    register_coco_json(names[1], write(folder, content), *others)
    with pytest.raises(ValueError, match="different metadata 'thing_classes'"):
        load_dataset(names)


def test_registered(folder, monkeypatch):  # noqa: F811
    """A dataset of Detectron2's is read once; other functions are called as ever."""
    content, name, cache = dataset(), "test_cache_coco", str(folder / "cache")
    path = write(folder, content)
    register_coco_instances(name, {}, path, str(folder))
    expected = as_text(DatasetCatalog.get(name))
    function, metadata = DatasetCatalog[name], MetadataCatalog.get(name).as_dict()
    for _ in range(2):
        use_cached(name, cache_registered(name, cache))
        assert isinstance(load_records(name), MappedRecords)
        assert as_text(load_records(name)) == as_text(DatasetCatalog.get(name)) == expected
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        register_coco_instances(name, {}, path, str(folder))
        monkeypatch.setattr("detectron2.data.datasets.coco.load_coco_json", None)
    use_cached(name, cache_registered(name, cache))
    found = MetadataCatalog.get(name).as_dict()
    assert found.pop("fingerprint").keys() == {"annotations"}
    assert found == metadata
    assert function is not DatasetCatalog[name]
    DatasetCatalog.register("test_cache_function", lambda: expected)
    MetadataCatalog.get("test_cache_function").json_file = path
    for other in ("test_cache_function", "test_cache_nothing", "coco_2017_train"):
        assert cache_registered(other, cache) is None
    for other in (name, "test_cache_function"):
        DatasetCatalog.remove(other)
        MetadataCatalog.remove(other)


def test_registered_again(folder, monkeypatch):  # noqa: F811
    """Once more in this process; moved images; other versions; with what cannot be cached."""
    name, cache, content = "test_cache/again", folder / "cache", dataset()
    for root in ("a", "b"):
        register_coco_instances(name, {}, write(folder, content), root)
        for _ in range(2):
            use_cached(name, cache_registered(name, str(cache)))
        assert load_records(name)[0]["file_name"] == f"{root}/a.png"
        for module in (dataset_cache, dataset_cache.detectron2):
            (before,) = cache.iterdir()
            monkeypatch.setattr(module, "__version__", root)
            use_cached(name, cache_registered(name, str(cache)))
            assert before not in cache.iterdir()
        assert len([*cache.iterdir()]) == 1
        DatasetCatalog.remove(name), MetadataCatalog.remove(name)
    lacking = [{k: v for k, v in x.items() if k != "width"} for x in content["images"]]
    objects = [[{**content["annotations"][0], "bbox": box}] for box in ([], 3)]
    for change in ({"images": lacking}, *({"annotations": x} for x in objects)):
        register_coco_instances(name, {}, write(folder, {**content, **change}), "a")
        assert cache_registered(name, str(cache)) is None
        DatasetCatalog.remove(name), MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("rank", "local_rank", "called", "message"),
    [(0, 0, 1, None), (1, 1, 0, None), (2, 0, 1, None), (2, 0, 1, "x"), (3, 1, 0, "from rank 2")],
)
def test_once_per_machine(monkeypatch, rank, local_rank, called, message):
    """In the first process of each of two machines; each process gets the value, or the error."""
    calls = []

    def function(value):
        calls.append(value)
        if message and rank:
            raise OSError(message)
        return value

    monkeypatch.setattr(setup.comm, "get_local_rank", lambda: local_rank)
    monkeypatch.setattr(setup.comm, "is_main_process", lambda: rank == 0)
    others = [message] if message and rank == 3 else []
    monkeypatch.setattr(setup.comm, "all_gather", lambda x: ["", *others, x])
    in_main = (lambda function, *args: function(*args)) if rank == 0 else lambda *args: args[1]
    monkeypatch.setattr(setup, "in_main_process", in_main)
    if message:
        with pytest.raises(InputError, match=f"^{message}$"):
            setup._once_per_machine(function, 7)
    else:
        assert setup._once_per_machine(function, 7) == 7
    assert calls == [7] * called


def test_what_cannot_be_written():
    writer, fields = RecordWriter(), {"image_id": 1, "height": 2, "width": 3}
    writer.add_image("a", fields)
    with pytest.raises(ValueError, match="image id 1 occurs more than once"):
        writer.add_image("b", fields)
    with pytest.raises(TypeError, match="JSON cannot hold a object"):
        writer.add_image("b", {**fields, "image_id": object()})
