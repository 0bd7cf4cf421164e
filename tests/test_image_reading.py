# SPDX-License-Identifier: Apache-2.0
"""Pixels of small images by value."""

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from libra_d2.data import read_image
from libra_d2.data.image_reading import displayed_size, is_whole
from libra_d2.errors import InputError

# As Exif defines them, by the visual position of the first stored row and column.
SEEN = {
    1: [[1, 2, 3], [4, 5, 6]],  # top, left
    2: [[3, 2, 1], [6, 5, 4]],  # top, right
    5: [[1, 4], [2, 5], [3, 6]],  # left, top
    6: [[4, 1], [5, 2], [6, 3]],  # right, top
    7: [[6, 3], [5, 2], [4, 1]],  # right, bottom
    8: [[3, 6], [2, 5], [1, 4]],  # left, bottom
}


@pytest.mark.parametrize("orientation", SEEN)
def test_orientation(tmp_path, orientation):
    """Exif orientation of color images and of grayscale with 8 and 16 bits."""
    exif, path = Image.Exif(), str(tmp_path / "a.png")
    exif[0x0112] = orientation
    stored, seen = np.array(SEEN[1], np.uint8), np.array(SEEN[orientation])
    Image.fromarray(np.stack([stored, 10 * stored, 40 * stored], axis=2)).save(path, exif=exif)
    with Image.open(path) as image:
        assert displayed_size(image) == seen.shape[::-1]
    assert read_image(path).tolist() == np.stack([40 * seen, 10 * seen, seen], axis=2).tolist()
    for image in (stored, stored.astype(np.uint16) * 257):
        Image.fromarray(image).save(path, exif=exif)
        assert read_image(path, "L").tolist() == seen[:, :, None].tolist()


def test_kinds(tmp_path):
    """Any kind of image is uint8 in the requested channel order."""
    path = str(tmp_path / "a.tif")
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 8, 7])
    for image, expected in (
        (Image.new("RGB", (1, 1), (1, 2, 3)), [1, 2, 3]),
        (Image.new("RGBA", (1, 1), (1, 2, 3, 128)), [1, 2, 3]),
        (Image.new("CMYK", (1, 1), (10, 20, 30, 0)), [245, 235, 225]),
        (Image.new("I;16", (1, 1), 7 * 257), [7, 7, 7]),
        (Image.new("1", (1, 1), 1), [255, 255, 255]),
        (palette, [9, 8, 7]),
    ):
        image.save(path)
        assert read_image(path).dtype == np.uint8
        assert read_image(path, "RGB").tolist() == [[expected]], image.mode
        assert read_image(path, "BGR").tolist() == [[expected[::-1]]], image.mode


def test_more_bits(tmp_path):
    """Grayscale is divided by 257, rounded and clipped."""
    sixteen = {0: 0, 128: 0, 129: 1, 385: 1, 386: 2, 32768: 128, 65406: 254, 65407: 255, 65535: 255}
    Image.fromarray(np.array([list(sixteen)], np.uint16)).save(tmp_path / "a.png")
    assert read_image(str(tmp_path / "a.png"), "L").ravel().tolist() == list(sixteen.values())
    Image.fromarray(np.array([[-300, 514, 70000]], np.int32)).save(tmp_path / "a.tif")
    assert read_image(str(tmp_path / "a.tif"), "L").ravel().tolist() == [0, 2, 255]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, "it has no known image format$") for content in (b"", b"\xff\xd8 no image")),
        *(("cut short", "truncated"), ("too large", "exceeds limit"), ("long text", "too large")),
        *(("broken tag", "not a TIFF"), ("none", "No such file")),
    ],
)
def test_unusable(tmp_path, monkeypatch, caplog, content, message):
    """Pillow raises five kinds of errors; each becomes one line that names the file."""
    path, info = tmp_path / "a.png", PngImagePlugin.PngInfo()
    if content == "long text":  # ValueError
        info.add_text("a", "x" * 2**21, zip=True)
    Image.effect_noise((40, 30), 50).save(path, pnginfo=info)
    if content == "too large":  # DecompressionBombError
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 30 // 3)
    elif content == "broken tag":  # SyntaxError
        Image.new("I;16", (4, 4)).save(path, exif=b"no Exif at all")
    elif content == "none":
        path.unlink()
    elif content != "long text":
        path.write_bytes(path.read_bytes()[:700] if content == "cut short" else content)
    with pytest.raises(InputError, match=message) as error:
        read_image(str(path))
    assert str(error.value).startswith(f"{path}: the image cannot be used: ")
    assert "\n" not in str(error.value)
    assert not caplog.records


def test_floating_point(tmp_path):
    path = tmp_path / "f.tif"
    Image.new("F", (4, 4)).save(path)
    message = f"^{path}: floating point pixels: save it with 8 bits per channel$"
    with pytest.raises(InputError, match=message):
        read_image(str(path))


@pytest.mark.parametrize("missing", [2, 1500])
def test_jpeg_cut_short(tmp_path, caplog, missing):
    """The missing part is gray, as with OpenCV. A warning names the file."""
    path = tmp_path / "a.jpg"
    Image.effect_noise((100, 80), 50).convert("RGB").save(path)
    whole, content = read_image(str(path)), path.read_bytes()
    assert not caplog.records
    path.write_bytes(content[:-missing])
    image = read_image(str(path))
    assert np.array_equal(image, cv2.imread(str(path)))
    assert np.array_equal(image[:8], whole[:8])
    warning = f"{path}: the file is cut short; what is missing is gray"
    assert [record.getMessage() for record in caplog.records] == [warning]


@pytest.mark.parametrize(("format", "end"), [("JPEG", b"\xff\xd9"), ("PNG", b"IEND")])
def test_is_whole(tmp_path, format, end):
    """The end marker is in the last 64 KiB."""
    path, after = tmp_path / "a", 65536 - len(end)
    for content, expected in (
        *((end, True), (end[:-1], False), (b"", False)),
        *((b"x" * 10 + end + b"x" * after, True), (end + b"x" * (after + 1), False)),
    ):
        path.write_bytes(content)
        assert is_whole(str(path), format) is expected
    path.write_bytes(b"\xff\xd9IEND")
    assert not is_whole(str(path), "BMP")
