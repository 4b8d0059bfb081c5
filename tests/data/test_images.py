"""Images: what is read becomes normalised RGB squares; what cannot be read is named."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from moresjax.core.errors import UserError
from moresjax.data.images import ImageProcessor, LazyPixels, image_path, open_image


def photo(size=(8, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def test_values_are_normalised():
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 0], image[0, 1] = (255, 0, 51), (255, 255, 255)
    pixels = ImageProcessor(4)(image)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0, 0], [1, -1, -0.6], atol=1e-6)
    np.testing.assert_array_equal(pixels[0, 1], 1)
    own = ImageProcessor(4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))(image)
    np.testing.assert_allclose(own[0, 0], [1.8, -0.8, -0.05], atol=1e-6)


def test_a_path_an_image_and_an_array_are_the_same(tmp_path):
    array = photo()
    image = Image.fromarray(array)
    image.save(tmp_path / "photo.png")
    processor = ImageProcessor(8)
    for source in (image, tmp_path / "photo.png", str(tmp_path / "photo.png")):
        np.testing.assert_array_equal(processor(source), processor(array))


@pytest.mark.parametrize("size", [(5, 13), (16, 16), (3, 2)])
def test_any_size_becomes_a_square(size):
    array = photo(size)
    resized = Image.fromarray(array).resize((8, 8), Image.Resampling.BICUBIC)
    processor = ImageProcessor(8)
    np.testing.assert_array_equal(processor(array), processor(np.asarray(resized)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_any_mode_becomes_rgb(mode, tmp_path):
    image = Image.fromarray(photo()).convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    for source in (image, path):
        opened = open_image(source)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(opened, image.convert("RGB"))


def test_a_grey_array_becomes_rgb():
    grey = photo()[..., 0]
    np.testing.assert_array_equal(open_image(grey), np.stack([grey] * 3, axis=-1))


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png does not exist"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=str(tmp_path)):
        open_image(tmp_path)


def test_a_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not an image")
    with pytest.raises(UserError, match=r"notes\.png cannot be read"):
        open_image(path)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp"])
def test_a_cut_off_image_is_named(tmp_path, kind):
    path = tmp_path / f"photo.{kind}"
    Image.fromarray(photo((64, 64))).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"photo\.{kind} cannot be read"):
        open_image(path)


@pytest.mark.parametrize("kind", ["raises", "no_such_mode"])
def test_whatever_a_decoder_raises_is_told(tmp_path, monkeypatch, kind):
    Image.fromarray(photo()).save(tmp_path / "photo.png")

    def fail(*_, **__):
        raise {"raises": RuntimeError("decoder broke"), "no_such_mode": KeyError("mode")}[kind]

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(UserError, match=r"photo\.png cannot be read: (decoder broke|'mode')"):
        open_image(tmp_path / "photo.png")


def damaged_dds() -> bytes:
    """A header of DDS whose pixel format no version of Pillow knows."""
    header = bytearray(128)
    header[:4] = b"DDS "
    struct.pack_into("<7I", header, 4, 124, 0x1007, 4, 4, 0, 0, 0)
    struct.pack_into("<II4s", header, 76, 32, 0x4, b"ZZZZ")
    return bytes(header)


@pytest.mark.parametrize("kind", ["avif", "dds", "long", "zero", "absent"])
def test_files_that_are_damaged_or_cannot_be_are_told(tmp_path, kind):
    names = {"long": f"{'x' * 300}.png", "zero": "a\0b.png"}
    path = tmp_path / names.get(kind, f"photo.{kind}")
    if kind == "avif":
        content = encoded("avif")
        path.write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))
    elif kind == "dds":
        path.write_bytes(damaged_dds())
    for read in (open_image, ImageProcessor(8)):
        with pytest.raises(UserError, match=r"^image .*(cannot be read: .|does not exist)"):
            read(path)
    if kind in ("long", "zero", "absent"):
        with pytest.raises(UserError, match=r"^image .*(cannot be read: .|does not exist)"):
            LazyPixels([path], lambda: photo()[None])


def test_what_a_saved_processor_raises_is_told(tmp_path):
    def reference(**_):
        raise ValueError("mean must have 1 elements")

    Image.fromarray(photo()).save(tmp_path / "photo.png")
    with pytest.raises(UserError, match=r"photo\.png cannot be used: mean must have 1 elements"):
        ImageProcessor(8, reference=reference)(tmp_path / "photo.png")


@pytest.mark.parametrize("image", ["/etc/hosts", "../x.png", "a/../../x.png", "..", "./../x"])
def test_a_path_out_of_the_root_is_refused(image):
    with pytest.raises(UserError, match=f"^question 7: image {image} is outside of the image root"):
        image_path("photos", image, "question 7")


@pytest.mark.parametrize("image", ["a.png", "a/b.png", "a/../b.png", "./c", "..a/b", "...png"])
def test_a_path_below_the_root_is_taken(tmp_path, image):
    assert image_path(tmp_path, image, "it").resolve().is_relative_to(tmp_path)


def test_an_image_bomb_is_named(tmp_path, monkeypatch):
    Image.fromarray(photo((64, 64))).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"bomb\.png cannot be read"):
        open_image(tmp_path / "bomb.png")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(photo((16, 16))).save(buffer, kind)
    return buffer.getvalue()


def test_a_damaged_header_is_named(tmp_path):
    content = bytearray(encoded("png"))
    content[11] = 5  # length of the first chunk, which has 13 bytes
    path = tmp_path / "photo.png"
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"photo\.png cannot be read"):
        open_image(path)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(["png", "jpeg", "gif"]), st.data())
def test_damaged_bytes_are_read_or_named(tmp_path_factory, kind, data):
    content = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / f"photo.{kind}"
    path.write_bytes(bytes(content))
    try:
        outcome = open_image(path).mode
    except UserError as error:
        outcome = str(error)
    assert outcome == "RGB" or str(path) in outcome


SQUARE = {"height": 28, "width": 28}
REFERENCES = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE),
    "siglip": SiglipImageProcessorPil(size=SQUARE),
}


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("size", [(40, 60), (60, 40), (28, 28), (7, 9)])
def test_a_saved_processor_is_that_of_transformers(kind, size, tmp_path):
    reference = REFERENCES[kind]
    reference.save_pretrained(tmp_path)
    image = Image.fromarray(photo(size))
    expected = reference(images=image, return_tensors="np")["pixel_values"][0]
    ours = ImageProcessor.from_pretrained(tmp_path, 28)(image)
    np.testing.assert_array_equal(ours, expected.transpose(1, 2, 0))


def test_a_processor_of_another_size_is_refused(tmp_path):
    REFERENCES["clip"].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"images become 28 x 28, not 56 x 56"):
        ImageProcessor.from_pretrained(tmp_path, 56)


@pytest.mark.parametrize("size", [(4, 8), (8, 4)])
def test_padding_keeps_the_whole_image_on_the_mean_colour(size):
    array = photo(size)
    pixels = ImageProcessor(8, mean=(0.2, 0.4, 0.6), std=(1.0, 1.0, 1.0), aspect="pad")(array)
    inside = np.zeros((8, 8), bool)
    inside[(slice(2, 6), slice(None)) if size == (4, 8) else (slice(None), slice(2, 6))] = True
    expected = array.reshape(-1, 3) / 255 - np.asarray([0.2, 0.4, 0.6])
    np.testing.assert_allclose(pixels[inside], expected, atol=1e-6)
    np.testing.assert_allclose(pixels[~inside], 0, atol=1 / 255)
    with pytest.raises(UserError, match=r"aspect 'fill'.*square, pad"):
        ImageProcessor(8, aspect="fill")


def test_sixteen_bit_greys_are_scaled(tmp_path):
    grey = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    opened = np.asarray(open_image(tmp_path / "deep.png"))
    np.testing.assert_array_equal(opened, np.stack([grey // 257] * 3, axis=-1))


def test_thin_images_are_read_up_to_a_limit(tmp_path):
    assert open_image(np.zeros((1, 200, 3), np.uint8)).size == (200, 1)
    Image.fromarray(np.zeros((1, 201, 3), np.uint8)).save(tmp_path / "thin.png")
    with pytest.raises(UserError, match=r"thin\.png has 201 x 1 pixels.*200-fold"):
        open_image(tmp_path / "thin.png")


def test_arrays_of_floats_are_told_what_to_be():
    with pytest.raises(UserError, match=r"an array of float32; give uint8, which is \(255 \* x\)"):
        open_image(np.zeros((4, 4, 3), np.float32))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("kind", ["TIFF", "array"])
def test_pixels_of_unknown_brightness_are_refused(tmp_path, dtype, kind):
    pixels = np.linspace(0, 255, 12).reshape(3, 4).astype(dtype)
    source = pixels if dtype == np.int32 else Image.fromarray(pixels)  # arrays of floats are told
    if kind == "TIFF":
        source = tmp_path / "scan.tiff"
        Image.fromarray(pixels).save(source)
    with pytest.raises(UserError, match="has numbers of 32 bits as pixels"):
        open_image(source)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_greys_of_16_bits_are_scaled(tmp_path, kind):
    file = tmp_path / "grey"
    Image.fromarray(np.asarray([[0, 257, 65535]], np.uint16)).save(file, kind)
    assert np.asarray(open_image(file))[0, :, 0].tolist() == [0, 1, 255]


def test_a_large_image_is_refused_before_it_is_decoded(tmp_path):
    # The header of a PNG of 144 megapixels, and nothing behind it.
    header = b"IHDR" + struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")
    body = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + crc + body
    with pytest.raises(UserError, match="has 12000 x 12000 pixels; at most 89,478,485 are read"):
        open_image(png)
