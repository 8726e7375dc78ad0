import numpy as np
import pytest
import torch
from PIL import Image

from provgen.data.images import (
    from_pil,
    is_grey,
    read_image,
    resize_and_crop,
    save_png,
    to_pil,
    to_uint8,
    to_unit_range,
)
from provgen.errors import InputError

ALL_LEVELS = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_level_survives_the_unit_range(dtype):
    unit = to_unit_range(ALL_LEVELS, torch.float32)
    assert unit.min() == -1
    assert unit.max() == 1
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(to_uint8(unit.to(dtype)), ALL_LEVELS)
    else:
        assert (to_uint8(unit.to(dtype)).int() - ALL_LEVELS.int()).abs().max() <= 1


def test_unit_range_follows_the_default_dtype():
    assert to_unit_range(ALL_LEVELS).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert to_unit_range(ALL_LEVELS).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_values_outside_the_unit_range_are_clamped():
    assert to_uint8(torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_pil_round_trip_is_exact(channels):
    image = torch.randint(256, (channels, 6, 6), dtype=torch.uint8)
    assert torch.equal(from_pil(to_pil(image), image_size=6, channels=channels), image)


def test_grey_becomes_three_equal_channels():
    grey = torch.randint(256, (1, 5, 5), dtype=torch.uint8)
    assert torch.equal(from_pil(to_pil(grey), image_size=5, channels=3), grey.expand(3, 5, 5))


def test_a_palette_image_equals_its_colours():
    colours = Image.new("RGB", (4, 4), (200, 30, 10))
    colours.putpixel((1, 2), (0, 90, 255))
    expected = from_pil(colours, image_size=4, channels=3)
    assert expected[:, 2, 1].tolist() == [0, 90, 255]
    assert torch.equal(from_pil(colours.quantize(), image_size=4, channels=3), expected)


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))])
def test_transparent_pixels_become_white(mode, colour):
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((0, 0), (*colour[:-1], 255))
    assert from_pil(image.resize((4, 2), Image.Resampling.NEAREST), image_size=2, channels=1).tolist() == [
        [[0, 255], [0, 255]]
    ]


def test_half_transparent_black_is_mid_grey():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert from_pil(image, image_size=2, channels=3).unique().tolist() == [127]


def test_a_transparent_palette_entry_becomes_white(tmp_path):
    image = Image.new("P", (2, 2), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "p.png", transparency=0)
    pixels = read_image(tmp_path / "p.png", image_size=2, channels=3)
    assert pixels[:, 0, 0].tolist() == [0, 0, 255]
    assert pixels[:, 1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257], [128 * 257, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    assert read_image(tmp_path / f"deep.{suffix}", image_size=2, channels=1).tolist() == [[[0, 1], [128, 255]]]


def test_pixels_without_a_known_range_are_refused():
    with pytest.raises(InputError, match="floating-point"):
        from_pil(Image.fromarray(np.ones((2, 2), np.float32)), image_size=2, channels=1)
    with pytest.raises(InputError, match="32-bit"):
        from_pil(Image.fromarray(np.full((2, 2), 70000, np.int32)), image_size=2, channels=1)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    stored = np.array([[10, 20], [30, 40]], np.uint8)
    Image.fromarray(stored).save(tmp_path / "r.png", exif=exif)
    assert read_image(tmp_path / "r.png", image_size=2, channels=1)[0].tolist() == [[30, 10], [40, 20]]


def test_the_centre_square_is_kept_at_full_size():
    image = torch.randint(256, (3, 4, 10), dtype=torch.uint8)
    assert torch.equal(from_pil(to_pil(image), image_size=4, channels=3), image[..., 3:7])


def test_shrinking_averages_and_keeps_constants():
    checkerboard = ((torch.arange(16)[:, None] + torch.arange(16)) % 2 * 255).to(torch.uint8)[None]
    shrunk = resize_and_crop(checkerboard, 4).int()
    assert (shrunk[:, 1:-1, 1:-1] - 127).abs().max() <= 2
    assert (shrunk - 127).abs().max() <= 30
    constant = torch.full((2, 3, 16, 16), 77, dtype=torch.uint8)
    assert torch.equal(resize_and_crop(constant, 5), constant[..., :5, :5])


def test_resizing_does_not_depend_on_the_batch():
    images = torch.randint(256, (5, 1, 9, 9), dtype=torch.uint8)
    assert torch.equal(resize_and_crop(images, 4)[2], resize_and_crop(images[2], 4))


def test_an_image_as_narrow_as_a_line_is_refused(tmp_path, message_of):
    Image.new("L", (500, 2)).save(tmp_path / "line.png")
    message = message_of(read_image, tmp_path / "line.png", image_size=8, channels=1)
    assert "line.png" in message
    assert "500 x 2" in message


def test_grey_is_told_by_mode_and_by_shown_palette_colours():
    grey, colour = Image.new("L", (3, 3), 9), Image.new("RGB", (3, 3), (9, 9, 10))
    assert is_grey(grey)
    assert is_grey(grey.convert("1"))
    assert is_grey(grey.convert("LA"))
    assert is_grey(Image.fromarray(np.zeros((2, 2), np.uint16)))
    assert is_grey(grey.convert("P"))
    assert not is_grey(colour)
    assert not is_grey(colour.quantize())


def test_a_missing_image_is_named(tmp_path, message_of):
    assert "gone.png" in message_of(read_image, tmp_path / "gone.png", image_size=8, channels=1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tif"])
def test_a_truncated_image_is_named(tmp_path, suffix, message_of):
    path = tmp_path / f"half.{suffix}"
    to_pil(torch.randint(256, (3, 40, 40), dtype=torch.uint8)).save(path)
    assert read_image(path, image_size=8, channels=3).shape == (3, 8, 8)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert path.name in message_of(read_image, path, image_size=8, channels=3)


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_named(tmp_path, content, message_of):
    (tmp_path / "text.png").write_bytes(content)
    message = message_of(read_image, tmp_path / "text.png", image_size=8, channels=1)
    assert "text.png" in message
    assert "0x" not in message


def test_flipping_any_byte_of_a_png_gives_an_image_or_an_input_error(tmp_path):
    path = tmp_path / "flipped.png"
    to_pil(torch.randint(256, (3, 6, 6), dtype=torch.uint8)).save(path)
    data = path.read_bytes()
    refused = 0
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :])
        try:
            assert read_image(path, image_size=6, channels=3).shape == (3, 6, 6)
        except InputError:
            refused += 1
    assert refused > len(data) // 2


def test_saved_png_holds_the_pixels_and_the_text(tmp_path):
    image = torch.randint(256, (3, 4, 4), dtype=torch.uint8)
    text = {"sources": '[{"path": "katzen/süß.png"}]', "note": "日本"}
    save_png(image, tmp_path / "new" / "a.png", text)
    assert torch.equal(read_image(tmp_path / "new" / "a.png", image_size=4, channels=3), image)
    with Image.open(tmp_path / "new" / "a.png") as saved:
        assert saved.text == text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_png_that_cannot_be_written_is_named(tmp_path, message_of):
    (tmp_path / "a.png").mkdir()
    image = torch.zeros(1, 2, 2, dtype=torch.uint8)
    assert "a.png" in message_of(save_png, image, tmp_path / "a.png", {})
