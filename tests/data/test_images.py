import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from provgen.data.images import (
    decode,
    from_pil,
    is_grey,
    read_image,
    require_memory,
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


def png(rows, *, bits, colour=0, transparent=None, more=b""):
    """Write a PNG by hand: `rows` hold the samples of each row, and `more` is put before the pixels."""
    packed = b"".join(b"\0" + pack_bits(row, bits) for row in rows)
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    header = struct.pack(">IIBBBBB", len(rows[0]) // samples, len(rows), bits, colour, 0, 0, 0)
    clear = b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    parts = [chunk(b"IHDR", header), more, clear, chunk(b"IDAT", zlib.compress(packed)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def pack_bits(row, bits):
    text = "".join(f"{value:0{bits}b}" for value in row)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def tiff(rows, *, bits, order="<", photometric, sample_format=1):
    """Write an uncompressed grey TIFF by hand."""
    if bits <= 8:
        pixels = b"".join(pack_bits(row, bits) for row in rows)
    else:
        code = {(16, 1): "H", (16, 2): "h", (32, 1): "I", (32, 2): "i"}[bits, sample_format]
        pixels = b"".join(struct.pack(f"{order}{len(row)}{code}", *row) for row in rows)
    entries = [(256, len(rows[0])), (257, len(rows)), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    entries += [(278, len(rows)), (279, len(pixels)), (339, sample_format)]
    # Tag, type LONG, one value.
    table = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries)
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(f"{order}HI", 42, 8 + len(pixels))
    return head + pixels + struct.pack(f"{order}H", len(entries)) + table + struct.pack(f"{order}I", 0)


def pixels_of(path, data, channels=1, size=2):
    path.write_bytes(data)
    return read_image(path, image_size=size, channels=channels).tolist()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_value_of_a_grey_png_becomes_white_at_any_depth(tmp_path, bits):
    top = 2**bits - 1
    rows = [[0, top], [top // 3, 0]]
    scaled = [[round(value * 255 / top) for value in row] for row in rows]
    assert pixels_of(tmp_path / "a.png", png(rows, bits=bits)) == [scaled]
    black_is_clear = png(rows, bits=bits, transparent=[0])
    assert pixels_of(tmp_path / "a.png", black_is_clear) == [[[255, 255], [255 if bits == 1 else scaled[1][0], 255]]]
    if bits > 1:
        third_is_clear = png(rows, bits=bits, transparent=[top // 3])
        assert pixels_of(tmp_path / "a.png", third_is_clear) == [[[0, 255], [255, 0]]]
        with Image.open(io.BytesIO(third_is_clear)) as image:
            assert from_pil(image, image_size=2, channels=1).tolist() == [[[0, 255], [255, 0]]]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_grey_png_with_an_alpha_channel_is_grey_and_laid_on_white(tmp_path, bits):
    top = 2**bits - 1
    data = png([[0, top, 0, 0], [top // 5, top, top // 5, 0]], bits=bits, colour=4)
    assert pixels_of(tmp_path / "a.png", data) == [[[0, 255], [51, 255]]]
    assert is_grey(decode(data))


def test_sixteen_bit_colours_with_a_transparent_one_are_refused(tmp_path, message_of):
    rows = [[0, 0, 0, 257, 514, 771], [0, 1, 2, 3, 4, 5]]
    assert pixels_of(tmp_path / "a.png", png(rows, bits=16, colour=2), channels=3)[2] == [[0, 3], [0, 0]]
    (tmp_path / "a.png").write_bytes(png(rows, bits=16, colour=2, transparent=[257, 514, 771]))
    assert "transparent" in message_of(read_image, tmp_path / "a.png", image_size=2, channels=3)
    eight = png([[1, 2, 3, 0, 0, 0], [9, 9, 9, 1, 2, 3]], bits=8, colour=2, transparent=[1, 2, 3])
    assert pixels_of(tmp_path / "a.png", eight, channels=3)[0] == [[255, 0], [9, 255]]


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(("bits", "order"), [(1, "<"), (4, ">"), (8, "<"), (8, ">"), (16, "<")])
def test_a_grey_tiff_is_read_whether_white_or_black_is_zero(tmp_path, bits, order, photometric):
    top = 2**bits - 1
    rows = [[0, top, 0, 0], [top // 3, top, 0, top]] * 2
    expected = [[round(value * 255 / top) for value in row] for row in rows]
    if photometric == 0:
        expected = [[255 - value for value in row] for row in expected]
    data = tiff(rows, bits=bits, order=order, photometric=photometric)
    assert pixels_of(tmp_path / "a.tif", data, size=4) == [expected]


def test_a_big_endian_tiff_of_16_bits_is_read_or_refused(tmp_path, message_of):
    rows = [[0, 65535], [257, 0]]
    black_is_zero, white_is_zero = (tiff(rows, bits=16, order=">", photometric=kind) for kind in (1, 0))
    assert pixels_of(tmp_path / "a.tif", black_is_zero) == [[[0, 255], [1, 0]]]
    (tmp_path / "a.tif").write_bytes(white_is_zero)
    assert "a.tif" in message_of(read_image, tmp_path / "a.tif", image_size=2, channels=1)


def test_the_twelve_bits_of_a_tiff_reach_white(tmp_path):
    rows = [[0, 4095], [2048, 16]]
    values = "".join(f"{value:012b}" for row in rows for value in row)
    pixels = bytes(int(values[i : i + 8], 2) for i in range(0, len(values), 8))
    plain = tiff([[0] * 3, [0] * 3], bits=8, photometric=1)
    assert len(pixels) == 6
    data = plain[:8] + pixels + plain[14:]
    for tag, value in ((256, 2), (258, 12)):
        at = data.index(struct.pack("<HHI", tag, 4, 1)) + 8
        data = data[:at] + struct.pack("<I", value) + data[at + 4 :]
    assert pixels_of(tmp_path / "a.tif", data) == [[[0, 255], [128, 1]]]


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("order", ["<", ">"])
def test_signed_and_32_bit_pixels_are_refused_by_their_mode_and_not_by_their_values(tmp_path, bits, order, message_of):
    for rows in ([[0, 1], [2, 3]], [[0, 255], [30000, 32767]]):
        (tmp_path / "a.tif").write_bytes(tiff(rows, bits=bits, order=order, photometric=1, sample_format=2))
        message = message_of(read_image, tmp_path / "a.tif", image_size=2, channels=1)
        assert "no known range" in message
    with pytest.raises(InputError, match="no known range"):
        from_pil(Image.fromarray(np.zeros((2, 2), np.int32)), image_size=2, channels=1)


@pytest.mark.parametrize("top", [65535, 1023])
def test_a_deep_pgm_is_scaled_by_its_own_white(tmp_path, top):
    raw = b"P5 2 2 %d\n" % top + struct.pack(">4H", 0, top, top // 2, 0)
    plain = b"P2 2 2 %d\n0 %d %d 0\n" % (top, top, top // 2)
    assert pixels_of(tmp_path / "a.pgm", raw) == pixels_of(tmp_path / "b.pgm", plain)
    assert pixels_of(tmp_path / "a.pgm", raw) == [[[0, 255], [127, 0]]]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("HSV", (85, 255, 255), (0, 255, 0)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("RGBa", (0, 0, 0, 0), (255, 255, 255)),
        ("La", (0, 0), (255, 255, 255)),
        ("PA", (0, 0), (255, 255, 255)),
        ("LAB", (138, 209, 198), (255, 0, 0)),
    ],
)
def test_other_modes_show_their_colours(mode, colour, expected):
    pixels = from_pil(Image.new(mode, (2, 2), colour), image_size=2, channels=3)
    assert (pixels[:, 0, 0].int() - torch.tensor(expected)).abs().max() <= 5
    grey = Image.new("RGB", (2, 2), expected).convert("L").getpixel((0, 0))
    assert abs(int(from_pil(Image.new(mode, (2, 2), colour), image_size=2, channels=1)[0, 0, 0]) - grey) <= 5


def test_an_image_is_refused_by_its_header_when_it_unpacks_to_more_than_it_may(tmp_path, message_of, recwarn):
    bomb = png([[0] * 8], bits=8)[:16] + struct.pack(">II", 30_000, 30_000)
    header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bomb[16:] + bytes([1, 0, 0, 0, 0]))
    (tmp_path / "bomb.png").write_bytes(header + chunk(b"IDAT", zlib.compress(bytes(100))))
    message = message_of(read_image, tmp_path / "bomb.png", image_size=8, channels=1)
    assert "bomb.png" in message
    assert "data.max_bytes=268435456" in message
    limit = {"image_size": 4, "channels": 1, "max_bytes": 4 * 16 * 16}
    write_black(tmp_path / "a.png", 16, 16)
    assert read_image(tmp_path / "a.png", **limit).shape == (1, 4, 4)
    write_black(tmp_path / "a.png", 16, 17)
    assert "data.max_bytes=1024" in message_of(read_image, tmp_path / "a.png", **limit)
    assert "data.max_bytes=1024" in message_of(from_pil, Image.new("L", (17, 16)), **limit)
    assert len(recwarn) == 0


def write_black(path, width, height):
    Image.new("L", (width, height)).save(path)


def test_what_max_bytes_allows_is_read_without_a_warning_whatever_pil_thinks(tmp_path, monkeypatch, recwarn):
    write_black(tmp_path / "a.png", 40, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(tmp_path / "a.png", image_size=4, channels=1).shape == (1, 4, 4)
    assert Image.MAX_IMAGE_PIXELS == 100
    assert len(recwarn) == 0


def test_an_icon_with_a_larger_picture_than_its_header_says_is_refused(tmp_path, message_of):
    inner = png([[0] * 400] * 400, bits=8)
    header = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 8, len(inner), 22)
    (tmp_path / "a.ico").write_bytes(header + inner)
    message = message_of(read_image, tmp_path / "a.ico", image_size=4, channels=1, max_bytes=2**16)
    assert "data.max_bytes=65536" in message


@pytest.mark.parametrize(
    ("name", "start"), [(b"zTXt", b"key\0\0"), (b"iCCP", b"name\0\0"), (b"iTXt", b"key\0\x01\0\0\0")]
)
def test_a_bomb_in_the_text_of_a_png_is_refused_before_it_unpacks(tmp_path, name, start, message_of):
    text = zlib.compress(bytes(2**26))
    (tmp_path / "a.png").write_bytes(png([[0, 0]], bits=8, more=chunk(name, start + text)))
    tracemalloc.start()
    try:
        message = message_of(read_image, tmp_path / "a.png", image_size=4, channels=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "a.png" in message
    assert peak < 2**24


def test_more_images_than_memory_holds_are_refused(message_of):
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert "lower data.image_size" in message_of(require_memory, pages // 3 + 1, 1)
    require_memory(pages // 3, 1)
