"""Images are prepared as transformers does it, and bad ones are refused by name."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nybble.errors import (
    ArgumentError,
    ConfigError,
    FileError,
    FormatError,
    MissingFileError,
    UnsupportedError,
)
from nybble.runtime import images
from nybble.runtime.images import ImageProcessor, open_image


def noise(height, width, seed=0):
    numbers = np.random.default_rng(seed)
    return numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)


PROCESSORS = {
    "ViTImageProcessorPil": {},
    "DeiTImageProcessorPil": {},
    "CLIPImageProcessorPil": {},
    "SiglipImageProcessorPil": {},
    "BitImageProcessorPil": {"size": {"shortest_edge": 256}},
    "ViTImageProcessorPil#odd": {"do_rescale": False, "size": {"height": 37, "width": 53}},
    "CLIPImageProcessorPil#small": {
        "do_resize": False,
        "crop_size": {"height": 51, "width": 64},
        "do_normalize": False,
    },
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_transformers_processors(name, tmp_path):
    import transformers

    theirs = getattr(transformers, name.partition("#")[0])(**PROCESSORS[name])
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / images.FILE).exists()
    ours = ImageProcessor.from_folder(tmp_path)
    for height, width in [(50, 80), (301, 300), (224, 224), (1, 1), (33, 7)]:
        picture = Image.fromarray(noise(height, width))
        wanted = theirs(picture, return_tensors="np")["pixel_values"][0]
        found = ours(picture)
        assert found.dtype == np.float32
        assert found.shape == wanted.shape
        assert np.array_equal(found, wanted.astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    crop=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_crops_are_the_middle(height, width, crop):
    from transformers.image_transforms import center_crop

    pixels = noise(height, width)
    plain = ImageProcessor(resize=None, crop=crop, rescale=None, mean=None, std=None)
    wanted = center_crop(pixels, crop, input_data_format="channels_last")
    assert np.array_equal(plain(pixels), wanted.transpose(2, 0, 1).astype(np.float32))


def test_other_sizes():
    square = ImageProcessor(resize=(224, 224)).at(70, 42)
    assert square(noise(99, 12)).shape == (3, 70, 42)
    cropped = ImageProcessor(resize=256, crop=(224, 224)).at(518, 518)
    assert (cropped.resize, cropped.crop) == (592, (518, 518))
    both = ImageProcessor(resize=(256, 256), crop=(224, 224)).at(112, 224)
    assert (both.resize, both.crop) == ((128, 256), (112, 224))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"size": {"height": 224}}, "size"),
        ({"size": {"height": 0, "width": 3}}, "size"),
        ({"size": {"shortest_edge": 10**9}}, "size"),
        ({"size": "big"}, "size"),
        ({"resample": 9}, "resample"),
        ({"resample": True}, "resample"),
        ({"do_center_crop": True}, "crop_size"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "crop_size"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"rescale_factor": -1}, "rescale_factor"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_mean": [1, 2, "3"]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"do_pad": True}, "do_pad"),
    ],
)
def test_settings_that_mean_nothing(change, word, tmp_path):
    good = {"size": 224, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    ImageProcessor.from_config(good)
    (tmp_path / images.FILE).write_text(json.dumps(good | change))
    with pytest.raises(ConfigError, match=f"{images.FILE}: {word}"):
        ImageProcessor.from_folder(tmp_path)


def test_no_settings(tmp_path):
    with pytest.raises(MissingFileError, match=images.FILE):
        ImageProcessor.from_folder(tmp_path)


def test_arrays_and_pictures():
    pixels = noise(5, 4)
    assert np.array_equal(np.asarray(open_image(pixels)), pixels)
    assert np.array_equal(np.asarray(open_image(np.asfortranarray(pixels))), pixels)
    grey = open_image(pixels[..., 0])
    assert np.array_equal(np.asarray(grey), pixels[..., :1].repeat(3, axis=2))
    for wrong in (pixels / 255, pixels[..., :2], pixels[None], pixels[:0], 7, None, b"bytes"):
        with pytest.raises(ArgumentError, match="image"):
            open_image(wrong)


def test_modes(tmp_path):
    pixels = noise(6, 9)
    rgb = Image.fromarray(pixels)
    clear = rgb.copy()
    clear.putalpha(0)
    assert np.asarray(open_image(clear)).min() == 255  # nothing but the white behind it
    cmyk = tmp_path / "cmyk.jpg"
    rgb.convert("CMYK").save(cmyk, quality=100, subsampling=0)
    found = np.asarray(open_image(cmyk)).astype(int)
    assert np.abs(found - pixels).mean() < 12
    for mode in ("L", "P", "1", "LA", "RGBA"):
        assert open_image(rgb.convert(mode)).mode == "RGB"
    for mode in ("I", "F", "I;16"):
        with pytest.raises(UnsupportedError, match="8 bits"):
            open_image(Image.new(mode, (3, 3)))


def test_pictures_are_turned_as_the_camera_was(tmp_path):
    pixels = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is on the right of the picture
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "turned.png")), np.rot90(pixels, -1))


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "dot.png")
    prepared = ImageProcessor(resize=(8, 8), rescale=1.0, mean=None)(tmp_path / "dot.png")
    assert np.array_equal(
        prepared, np.array([10, 20, 30], np.float32)[:, None, None].repeat(8, 1).repeat(8, 2)
    )


def test_animations_and_pages(tmp_path):
    frames = [Image.fromarray(noise(8, 8, seed)) for seed in range(3)]
    for name in ("moving.gif", "pages.tiff", "moving.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(FormatError, match=r"3 frames or pages"):
            open_image(tmp_path / name)
    frames[0].save(tmp_path / "still.gif")
    assert open_image(tmp_path / "still.gif").size == (8, 8)


def bomb(width, height):
    """A PNG that says it is huge; its pixels are missing."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_huge_images_are_refused_before_they_are_decoded(tmp_path):
    for side in (10_000, 14_000, 60_000):
        (tmp_path / "bomb.png").write_bytes(bomb(side, side))
        with pytest.raises(FormatError, match="pixels"):
            open_image(tmp_path / "bomb.png")
    with pytest.raises(FormatError, match="pixels"):
        ImageProcessor(resize=10_000)(noise(1, 9))


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
def test_damaged_files(kind, tmp_path):
    file = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(file, kind)
    whole = file.getvalue()
    numbers = np.random.default_rng(5)
    path = tmp_path / f"damaged.{kind}"
    cuts = [whole[:size] for size in (0, 1, 10, 40, len(whole) // 2)]
    flipped = []
    for _ in range(60):
        data = bytearray(whole)
        for at in numbers.integers(0, min(len(data), 600), 8):
            data[at] = numbers.integers(256)
        flipped.append(bytes(data))
    for data in cuts:
        path.write_bytes(data)
        with pytest.raises(FormatError, match=f"damaged.{kind}"):
            open_image(path)
    for data in flipped:  # some are still images
        path.write_bytes(data)
        try:
            assert open_image(path).mode == "RGB"
        except (FormatError, UnsupportedError) as error:
            assert str(path) in str(error)  # noqa: PT017  # whichever it is


def test_what_is_no_image(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(FormatError, match=r"text\.png"):
        open_image(tmp_path / "text.png")
    with pytest.raises(MissingFileError):
        open_image(tmp_path / "none.png")
    with pytest.raises(FileError):
        open_image(tmp_path)
