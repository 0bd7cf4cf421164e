# SPDX-License-Identifier: Apache-2.0
"""The page as a file, and in a real browser if there is Chromium. Nothing needs a network."""

import base64
import io
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from test_matching import by_hand, random_dataset

from libra_d2.errors import ArgumentError, InputError
from libra_d2.evaluation.comparison import compare_images, compare_metrics
from libra_d2.evaluation.detection_metrics import DetectionMetrics
from libra_d2.evaluation.error_page import write_error_page
from libra_d2.evaluation.matching import match_detections
from libra_d2.evaluation.runs import compare_models, describe_runs

NASTY = "</script><b>&lt;\"'${x}"
OBJECT, ELSEWHERE = [0, 0, 10, 10], [50, 50, 40, 40]


def write(path, dataset, *results, iou_type="bbox", **options):
    """Write the page and return what its numbers are."""
    models = [DetectionMetrics(match_detections(dataset, x, iou_type)) for x in results]
    pairs = [[(models[0], x)] for x in models[1:]]
    numbers = {"models": [describe_runs([x]) for x in models], "comparisons": []}
    for own in pairs:
        metrics, images = compare_metrics(*own[0], resamples=20), compare_images(*own)
        numbers["comparisons"].append({"pairs": 1, "metrics": metrics, "images": images})
    names = options.pop("names", [f"model {i}" for i in range(len(models))])
    write_error_page(str(path), numbers, dataset, models, results, names=names, **options)
    return numbers


def write_three(path, dataset, results):
    """A page of three models, trained twice each, and with their curves."""
    parts = [[results[i::4] for i in own] for own in ((0, 1), (1, 2), (3, 0))]
    models = [
        {seed: DetectionMetrics(match_detections(dataset, x)) for seed, x in enumerate(own)}
        for own in parts
    ]
    numbers = compare_models(models)
    curve = {"iterations": [5, 9], "mean": [1.0, 2.0], "low": [1.0, None], "high": [3.0, 2.5]}
    write_error_page(
        *(str(path), numbers, dataset, [x[0] for x in models], [x[0] for x in parts]),
        names=["first", "second", "third"],
        curves=[curve, None, curve],
    )
    return numbers


class Scripts(HTMLParser):
    """The text of script elements, by id."""

    def __init__(self, path):
        super().__init__(convert_charrefs=False)
        self.found, self.own, self.tags = {}, None, []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.own = dict(attrs).get("id", "code") if tag == "script" else None

    def handle_data(self, text):
        if self.own:
            self.found[self.own] = self.found.get(self.own, "") + text

    def handle_endtag(self, tag):
        self.own = None


def read(path):
    """The data, and those of the pictures in their order."""
    scripts = Scripts(path).found
    assert '": ' not in scripts["data"]  # compact
    pictures = [json.loads(scripts[f"picture-{i}"]) for i in range(len(scripts) - 3)]
    return json.loads(scripts["data"]), pictures


def test_data(tmp_path):
    """All numbers are in the file as they were, but the images of each model, which are no use."""
    dataset, results = random_dataset(2, name=NASTY)
    path = tmp_path / "index.html"
    numbers = write(
        path, dataset, results[::2], results, results[::3], names=(NASTY, "b", "c"), title=NASTY
    )
    data, _ = read(path)
    for model in numbers["models"]:
        model.pop("images")
    assert data["models"] == numbers["models"]
    assert data["names"] == [NASTY, "b", "c"]
    assert data["thresholds"] == [x / 100 for x in range(50, 100, 5)]
    assert data["class_names"][0] == NASTY
    assert data["num_images"] == len(data["images"]) == 12
    gaps = []
    for found, comparison in zip(data["comparisons"], numbers["comparisons"]):
        rows = comparison.pop("images")
        only = [sum(x[k] for x in rows) for k in ("only_a", "only_b")]
        assert found == {**comparison, "only": only}
        by_id = {x["image_id"]: x for x in rows}
        gaps.append([abs(by_id[x["image_id"]]["difference"] or 0) for x in data["images"]])
    largest = list(map(max, zip(*gaps)))
    assert largest == sorted(largest, reverse=True)
    assert gaps[0] != sorted(gaps[0], reverse=True)
    for image in data["images"]:
        row = by_id[image["image_id"]]
        assert [image["ap"][0], image["ap"][2]] == [row["a"], row["b"]]
        assert image["only"][1] == [row["only_a"], row["only_b"]]


def test_names_are_no_markup(tmp_path):
    """The same elements as with plain names."""
    tags = []
    for name in (NASTY, "plain"):
        dataset, results = random_dataset(2, name=name)
        dataset["images"][0]["file_name"] = name
        path = tmp_path / "index.html"
        write(path, dataset, results, names=[name], title=name)
        tags.append(Scripts(path).tags)
        assert f"<title>{'plain' if name == 'plain' else '&lt;/script&gt;'}" in path.read_text()
    assert tags[0] == tags[1]


def test_boxes(tmp_path):
    """
    In image 1, A finds the first object and takes a piece of the second one for another, and once
    for another class; B finds neither, and has a detection in the crowd region.
    """
    objects = [(0, "c", OBJECT), (1, "a", OBJECT), (1, "b", ELSEWHERE), (1, "a", [60, 0, 30, 30])]
    first = [(1, "a", [50, 50, 40, 38], 0.6), (1, "a", [0, 0, 10, 5.16], 0.91234)]
    first += [(0, "c", OBJECT, 0.2), (1, "b", [50, 50, 40, 16], 0.7)]
    dataset, results = by_hand(objects, first, 2)
    dataset["annotations"][3]["iscrowd"] = 1
    others = by_hand(objects, [(1, "a", [62, 2, 20, 20], 0.4)], 2)[1]
    write(tmp_path / "index.html", dataset, results, others)
    data, (found, picture) = read(tmp_path / "index.html")
    assert data["class_names"] == ["a", "b", "c"]
    mine = [[0, 0, 10, 5.2, 0, 0.912, "right", 0], [50, 50, 40, 16, 1, 0.7, "localization", -1]]
    mine.append([50, 50, 40, 38, 0, 0.6, "classification", -1])
    assert picture == {
        "objects": [
            *([*OBJECT, 0, [[0.516, 0.912], None]], [*ELSEWHERE, 1, [None, None]]),
            [60, 0, 30, 30, 0],
        ],
        "detections": [mine, [[62, 2, 20, 20, 0, 0.4, "not counted", -1]]],
    }
    assert found["objects"] == [[*OBJECT, 2, [[1, 0.2], None]]]
    assert found["detections"] == [[[*OBJECT, 2, 0.2, "right", 0]], []]
    assert [x["classes"] for x in data["images"]] == [[2], [0, 1]]


def test_masks(tmp_path):
    """Of masks without boxes, the boxes are in the file."""
    dataset, results = random_dataset(3)
    boxes = [[x["image_id"], *x.pop("bbox")] for x in results]
    write(tmp_path / "index.html", dataset, results, iou_type="segm")
    data, pictures = read(tmp_path / "index.html")
    ids = [image["image_id"] for image in data["images"]]
    found = [[i, *x[:4]] for i, own in zip(ids, pictures) for x in own["detections"][0]]
    assert sorted(found) == sorted(boxes)


def test_worst_images_of_one_model(tmp_path):
    """Lowest AP first, then those with more errors; images without objects last."""
    objects = [(i, "a", OBJECT) for i in range(3)]
    detections = [(0, "a", OBJECT, 0.9), (2, "a", ELSEWHERE, 0.3), (3, "a", OBJECT, 0.5)]
    dataset, results = by_hand(objects, detections, 4)
    write(tmp_path / "index.html", dataset, results, max_images=2)
    data, _ = read(tmp_path / "index.html")
    rows = [(x["image_id"], x["ap"], x["errors"]) for x in data["images"]]
    assert rows == [(2, [0], 2), (1, [0], 1)]
    assert data["num_images"] == 4
    assert data["comparisons"] == []
    write(tmp_path / "index.html", dataset, results)
    assert [x["image_id"] for x in read(tmp_path / "index.html")[0]["images"]] == [2, 1, 0, 3]
    write(tmp_path / "index.html", dataset, results, max_images=0)
    assert read(tmp_path / "index.html")[0]["images"] == []


def save_images(folder, dataset, portraits=()):
    """Each of another color than the one before."""
    for i, image in enumerate(dataset["images"]):
        pixels = np.zeros((960, 480, 3) if i in portraits else (480, 960, 3), dtype=np.uint8)
        pixels[:, :, i % 3] = 200
        Image.fromarray(pixels).save(folder / image["file_name"])


def test_pictures(tmp_path):
    """JPEG files with a longest side of 480 pixels."""
    dataset, results = random_dataset(2, num_images=2)
    save_images(tmp_path, dataset, portraits=[1])
    write(tmp_path / "index.html", dataset, results, image_root=str(tmp_path))
    data, pictures = read(tmp_path / "index.html")
    for image, picture in zip(data["images"], pictures):
        jpeg = Image.open(io.BytesIO(base64.b64decode(picture["jpeg"])))
        i = int(image["file_name"][0])
        assert (jpeg.format, jpeg.size) == ("JPEG", ((480, 240), (240, 480))[i])
        assert max(jpeg.quantization[0]) == 61  # half of 121, at a quality of 75
        assert np.asarray(jpeg).mean((0, 1)).argmax() == i
        assert image["size"] == [320 + i, 300 + i]


def test_many(tmp_path):
    """Of all classes together, the 100 boxes with the highest scores; 200 images; 23 models."""
    detections = [("ab"[i % 2], OBJECT, 1 - i / 1000) for i in range(120)]
    write(tmp_path / "index.html", *by_hand([("a", OBJECT)], detections, 201))
    data, pictures = read(tmp_path / "index.html")
    assert (len(data["images"]), data["num_images"]) == (200, 201)
    (own,) = pictures[0]["detections"]
    assert [x[5] for x in own] == [round(1 - i / 1000, 3) for i in range(100)]
    write(tmp_path / "index.html", by_hand([("a", OBJECT)], [])[0], *[[]] * 23)
    assert len(read(tmp_path / "index.html")[1][0]["detections"]) == 23


def test_refusals(tmp_path, monkeypatch):
    dataset, results = random_dataset(2, num_images=2)
    path = tmp_path / "index.html"
    with pytest.raises(InputError, match=re.escape("0.jpg")):
        write(path, dataset, results, image_root=str(tmp_path))
    for number in (0, 24):
        with pytest.raises(ArgumentError, match="models is .*use 1 to 23"):
            write(path, dataset, *[[]] * number)
    with pytest.raises(ArgumentError, match="max_images is -1: use 0 or more"):
        write(path, dataset, results, max_images=-1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(path, dataset, results, curves=[math.nan])
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(InputError, match=re.escape('pip install "libra_d2[report]"')):
        write(path, dataset, results)
    assert not path.exists()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pages of two models and of one."""
    folder = tmp_path_factory.mktemp("pages")
    dataset, results = random_dataset(2, name=NASTY)
    save_images(folder, dataset)
    options = {"image_root": str(folder), "title": NASTY}
    write(folder / "two.html", dataset, results[::2], results, names=(NASTY, "b" * 90), **options)
    write(folder / "one.html", dataset, results, names=[NASTY], **options)
    write(folder / "empty.html", dataset, [], [])
    write_three(folder / "three.html", dataset, results)
    write(folder / "none.html", dataset, results, results[:9], max_images=0)
    return folder


@pytest.fixture
def open_page(browser, files):
    """Open a page, wait for its charts, and check at the end that nothing went wrong."""
    problems, pages = [], []

    def open_one(name, width=1280):
        page = browser.new_page(viewport={"width": width, "height": 800})
        pages.append(page)
        page.set_default_timeout(120_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda x: problems.extend({x.url} if x.url[:4] == "http" else ()))
        page.goto((files / name).as_uri())
        page.wait_for_selector("html[data-charts]", state="attached")
        return page

    yield open_one
    for page in pages:
        page.close()
    assert problems == []


def column(page, table, number):
    return page.locator(f"#{table} tbody tr td:nth-child({number})").all_inner_texts()


@pytest.mark.parametrize(
    ("name", "width"),
    [(x, 360) for x in ("two", "one", "three", "none")] + [(x, 1280) for x in ("two", "empty")],
)
def test_opens(open_page, name, width):
    """No errors, no network, all charts, and nothing wider than the window."""
    page = open_page(f"{name}.html", width)
    charts = page.locator(".chart").count()
    assert charts == {"one": 5, "three": 7}.get(name, 6)
    assert page.locator(".chart svg.main-svg").count() >= charts
    of_chart = "x => [x.offsetHeight, x.querySelector('.main-svg').getBoundingClientRect().height]"
    for chart in page.locator(".chart").all():
        outer, inner = chart.evaluate(of_chart)
        assert outer == inner
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if name in ("two", "one"):
        assert page.locator("h1").inner_text() == NASTY
        assert NASTY in page.locator("#names").inner_text()
        assert NASTY[:9] in page.locator("#classes-chart").text_content()
        assert page.locator("#photo").evaluate("x => x.decode().then(() => x.naturalWidth)") == 480


def test_no_interval(open_page, files):
    """Of one image there is none, in the table as in the chart, and so there is no verdict."""
    dataset, results = by_hand([(0, "a", OBJECT)], [(0, "a", OBJECT, 0.9)], 1)
    write(files / "few.html", dataset, results, [])
    page = open_page("few.html")
    assert column(page, "metrics-table", 4)[0] == "−100.0"
    assert column(page, "metrics-table", 5)[0] == "–"
    bars = "document.getElementById('differences-chart').data[0].error_x"
    assert set(page.evaluate(f"[...{bars}.array, ...{bars}.arrayminus]")) == {0}
    assert "No difference in the table is clear" in page.locator("#summary").inner_text()


def test_sorting(open_page):
    """Largest first, then smallest; texts the other way round; by keyboard as by mouse."""
    page = open_page("two.html")
    header = page.locator("#images-table th").nth(1)
    aps = column(page, "images-table", 2)
    header.locator("button").click()
    values = [float(x) for x in column(page, "images-table", 2) if x != "–"]
    assert values == sorted(values, reverse=True)
    assert header.get_attribute("aria-sort") == "descending"
    header.locator("button").press("Enter")
    after = column(page, "images-table", 2)
    values = [float(x) for x in after if x != "–"]
    assert values == sorted(values)
    assert sorted(after) == sorted(aps)
    assert after.index("–") == len(values)
    page.locator("#images-table th button").first.click()
    assert column(page, "images-table", 1) == [f"{i}.jpg" for i in range(12)]
    assert header.get_attribute("aria-sort") == "none"


def test_switches(open_page):
    """A click and the key hide a model's boxes, and show them again."""
    page = open_page("two.html")
    for layer, key in (("truth", "g"), ("model-0", "a"), ("model-1", "b")):
        boxes = page.locator(f"#overlay .{layer}")
        if not boxes.count():
            page.locator("#min-score").fill("0")
            page.locator("#min-score").press("Enter")
            page.locator("h1").click()
        assert boxes.first.is_visible()
        page.locator(f"#show-{layer}").click()
        assert not boxes.first.is_visible()
        page.keyboard.press(key)
        assert boxes.first.is_visible()
        for shortcut in (key.upper(), f"Control+{key}"):  # the latter is the browser's
            page.keyboard.press(shortcut)
            assert not boxes.first.is_visible()


def test_compared_models(open_page, tmp_path):
    """The last one first; tables, charts and boxes follow the choice, curves show all."""
    page = open_page("three.html")
    page.locator("#min-score").fill("0")
    page.locator("#min-score").press("Enter")
    numbers = write_three(tmp_path / "a.html", *random_dataset(2))
    for letter, name, rows in (("C", "third", 1), ("B", "second", 0)):
        if letter == "B":
            page.locator("#pair").select_option(label="B: second")
        metrics = numbers["comparisons"][rows]["metrics"]
        header = page.locator("#metrics-table th").all_inner_texts()
        assert [x.split()[0] for x in header][2:4] == [letter, letter]
        shown = [x.replace("−", "-") for x in column(page, "metrics-table", 4)]
        changes = [x["difference"] for x in metrics]
        assert shown == [("+" if x > 0 else "") + f"{x:.1f}" for x in changes]
        deviation = numbers["models"][rows + 1]["deviations"]["AP"]
        assert column(page, "metrics-table", 3)[0] == f"{metrics[0]['b']:.1f} ± {deviation:.1f}"
        assert f"{letter} less A" in page.locator("#differences-chart").text_content()
        assert f"{letter}: {name}" in page.locator("#switches").inner_text()
        assert f"{letter} less A" in " ".join(page.locator("#images-table th").all_inner_texts())
        assert re.search(
            f"AP A .* %, {letter} .* %, on average", page.locator("#image-name").inner_text()
        )
        assert f"%, {letter} has {metrics[0]['b']:.1f} % (" in page.locator("#summary").inner_text()
        assert "means of 2 pairs of runs" in page.locator("#summary").inner_text()
        (picture, *_) = read(tmp_path / "a.html")[1]
        boxes = page.locator("#overlay .model-1").count()
        assert boxes == len(picture["detections"][rows + 1])
        page.locator("#show-model-1").click()
        assert page.locator("#overlay.no-model-1").count()
    page.keyboard.press("b")
    assert not page.locator("#overlay.no-model-1").count()
    drawn = "id => document.getElementById(id).data.filter(x => x.name).map(x => x.name)"
    assert page.evaluate(drawn, "iou-chart") == ["A", "B", "C"]
    assert page.evaluate(drawn, "training-chart") == ["A", "C"]
    bars = page.evaluate("document.getElementById('iou-chart').data.map(x => x.error_y.array[0])")
    assert bars == [pytest.approx(x["deviations"]["AP50"]) for x in numbers["models"]]


def test_next_image(open_page):
    """Buttons, arrow keys and the table show images; there is no image before the first one."""
    page = open_page("two.html")
    names = column(page, "images-table", 1)

    def shown():
        return page.locator("#image-name").inner_text().split(":")[0]

    assert shown() == names[0]
    assert page.locator("#previous").is_disabled()
    page.keyboard.press("ArrowLeft")
    assert shown() == names[0]
    page.keyboard.press("ArrowRight")
    assert shown() == names[1]
    page.locator("#next").click()
    page.locator("#previous").click()
    page.keyboard.press("ArrowLeft")
    assert shown() == names[0]
    page.get_by_role("button", name=names[-1], exact=True).click()
    assert shown() == names[-1]
    assert page.locator("#next").is_disabled()
    page.locator("#min-score").press("ArrowLeft")  # which has a use of its own for it
    assert shown() == names[-1]


def test_class_filter(open_page, files):
    """Only images and boxes of this class."""
    page, data = open_page("two.html"), read(files / "two.html")[0]
    page.locator("#next").click()  # the first one of the class is shown, wherever one was before
    page.locator("#class-filter").select_option(label=NASTY)
    chosen = [x["file_name"] for x in data["images"] if 0 in x["classes"]]
    assert 0 < len(chosen) < 12
    seen = []
    for name in chosen:
        seen.append(page.locator("#image-name").inner_text().split(":")[0])
        assert set(column(page, "objects-table", 1)) <= {NASTY}
        assert all(NASTY in x for x in page.locator("#overlay title").all_text_contents())
        page.keyboard.press("ArrowRight")
        assert name == seen[-1]
    assert f"{len(chosen)} have this class" in page.locator("#images-count").inner_text()
