"""Images as a model gets them: the bundled digits, folders with and without classes, and folders that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from danlu.assets import digits
from danlu.training.image_tables import Images
from danlu.training.images import grid_image, read_images


def picture(path: Path, side: tuple[int, int] = (4, 4), mode: str = "L", colour: object = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, side, colour).save(path)
    return path


def test_the_digits_are_the_bundled_ones_in_minus_one_to_one():
    data = read_images(Images())
    images, labels = digits()
    assert data.pixels.shape == (1797, 1, 8, 8) and data.classes == tuple("0123456789")
    assert torch.equal(data.labels, labels)
    batch = data.batch(torch.tensor([5, 0]))
    torch.testing.assert_close(batch[:, 0], 2 * images[[5, 0]] - 1, atol=1.01 / 255, rtol=0)
    assert read_images(Images(classes=False)).labels is None


def test_subfolders_are_classes(tmp_path):
    picture(tmp_path / "cat" / "a.png", colour=0)
    picture(tmp_path / "cat" / "deep" / "b.png", colour=10)
    picture(tmp_path / "ant" / "c.PNG", colour=255)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    data = read_images(Images(source=str(tmp_path)))
    assert data.classes == ("ant", "cat") and data.labels.tolist() == [0, 1, 1]
    assert data.pixels[:, 0, 0, 0].tolist() == [255, 0, 10]
    assert data.batch(torch.tensor([0, 1]))[:, 0, 0, 0].tolist() == [1.0, -1.0]


def test_colour_stays_where_one_image_has_it(tmp_path):
    picture(tmp_path / "a.png", mode="RGB", colour=(255, 0, 10))
    picture(tmp_path / "b.png")
    data = read_images(Images(source=str(tmp_path), classes=False))
    assert data.pixels.shape == (2, 3, 4, 4) and data.pixels[0, :, 0, 0].tolist() == [255, 0, 10]
    assert read_images(Images(source=str(tmp_path), classes=False, colour="gray")).pixels.shape == (2, 1, 4, 4)


def test_transparent_images_lie_on_white(tmp_path):
    picture(tmp_path / "a.png", mode="RGBA", colour=(0, 0, 0, 0))
    data = read_images(Images(source=str(tmp_path), classes=False))
    assert data.pixels.unique().tolist() == [255]


def test_images_of_mixed_size_are_refused_with_both_sizes_and_the_fix(tmp_path):
    picture(tmp_path / "a.png", (4, 4))
    picture(tmp_path / "b.png", (6, 5))
    with pytest.raises(ValueError, match=r"b.png is 6 x 5 and .*a.png is 4 x 4: choose one with --size N --resize"):
        read_images(Images(source=str(tmp_path), classes=False))
    with pytest.raises(ValueError, match=r"b.png is 6 x 5, but data.size is 4 x 4: set data.resize=true \(--resize\)"):
        read_images(Images(source=str(tmp_path), classes=False, size=4))
    data = read_images(Images(source=str(tmp_path), classes=False, size=4, resize=True))
    assert data.pixels.shape == (2, 1, 4, 4)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data.source must be 'digits' or a folder of images"):
        read_images(Images(source=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="no images in .*: files must end in .png"):
        read_images(Images(source=str(tmp_path)))
    picture(tmp_path / "wide.png", (6, 4))
    with pytest.raises(ValueError, match="wide.png is 6 x 4: --size N --resize keeps their middles"):
        read_images(Images(source=str(tmp_path), classes=False))
    with pytest.raises(ValueError, match="wide.png does not: move it, or set data.classes=false"):
        read_images(Images(source=str(tmp_path)))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="bad.png cannot be read as an image"):
        read_images(Images(source=str(tmp_path), classes=False))


def test_the_digits_have_one_size_and_no_colour():
    with pytest.raises(ValueError, match="data.size must be 8 for the bundled digits, got 16"):
        read_images(Images(size=16))
    with pytest.raises(ValueError, match="data.colour must be gray or auto"):
        read_images(Images(colour="rgb"))


def test_a_sheet_shows_every_pixel_as_a_square():
    samples = torch.full((3, 1, 2, 2), -1.0)
    samples[1] = 1.0
    samples[2, 0, 0, 1] = 5.0  # out of range: white
    sheet = grid_image(samples, columns=2, scale=3)
    assert sheet.size == (2 * 7 + 1, 2 * 7 + 1) and sheet.mode == "L"
    assert sheet.getpixel((1, 1)) == 0 and sheet.getpixel((8, 6)) == 255
    assert sheet.getpixel((4, 8)) == 255 and sheet.getpixel((3, 8)) == 0
    assert sheet.getpixel((0, 0)) == 128 and sheet.getpixel((8, 8)) == 128
    assert grid_image(torch.zeros(1, 3, 2, 2), 4).mode == "RGB"
