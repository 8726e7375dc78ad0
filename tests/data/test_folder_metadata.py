import pytest

from provgen.data.folder import ImageMetadata, read_metadata

PATHS = ["a.png", "sub/b.png"]


def test_no_file_means_no_metadata(tmp_path):
    assert read_metadata(tmp_path / "metadata.csv", PATHS) == {}


def test_rows_are_keyed_by_path_and_empty_cells_are_none(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_bytes("\ufefflicense,file_name,label\r\nCC0,./sub/b.png, cat \r\n,a.png\r\n".encode())
    assert read_metadata(path, PATHS) == {
        "sub/b.png": ImageMetadata(label="cat", license="CC0"),
        "a.png": ImageMetadata(),
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no column file_name"),
        (b"name,label\na.png,x\n", "its columns can be file_name, label"),
        (b"file_name,licence\na.png,x\n", "'licence'"),
        (b"file_name,label,label\na.png,x,y\n", "twice"),
        (b"file_name,label\nb.png,x\n", "line 2: no image 'b.png'"),
        (b"file_name,label\na.png,x\n./a.png,x\n", "line 3: second row for a.png"),
        (b"file_name,label\na.png,x,y\n", "line 2: more cells"),
        (b"file_name,label\n,x\n", "line 2: file_name is empty"),
        (b'file_name,label\na.png,"x\n', "cannot read"),
        (b"file_name,label\na.png,\xff\n", "UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "csv",
)
def test_mistakes_are_named_with_their_line(tmp_path, content, says, message_of):
    path = tmp_path / "metadata.csv"
    path.write_bytes(content)
    message = message_of(read_metadata, path, PATHS)
    assert says in message
    assert str(path) in message
