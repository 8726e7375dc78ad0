"""Whatever is in a file or a setting, it is read, or refused in one line, and soon."""

import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from provgen import build
from provgen.data.folder import load_image_folder
from provgen.data.images import read_image
from provgen.data.manifest import Manifest
from provgen.data.packed import read_idx_folder
from provgen.errors import InputError
from provgen.pipeline import ProvenancePipeline
from provgen.run import RunFolder, read_json, seal
from provgen.settings import Settings, flat_settings
from provgen.settings_file import load_settings
from provgen.tracing.records import read_parts
from provgen.training.checkpoint import resume_latest
from provgen.training.logging import read_metrics

pytestmark = pytest.mark.slow

MOST_SECONDS = 10


def fuzz(examples: int) -> settings:
    """Try so many cases, the same ones each time."""
    unwanted = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=unwanted
    )


def attempt(read: Callable[[], object]) -> None:
    """Read something; it is read, or refused in one line."""
    start, message = time.monotonic(), "none"
    try:
        read()
    except InputError as error:
        message = str(error)
    assert message.strip()
    assert "\n" not in message
    assert time.monotonic() - start < MOST_SECONDS


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Change, cut, repeat or insert some bytes; or give others altogether."""
    kind = draw(st.sampled_from(["bytes", "cut", "insert", "repeat", "other"]))
    if kind == "other":
        return draw(st.binary(max_size=200))
    place = draw(st.integers(0, len(content)))
    if kind == "cut":
        return content[:place]
    if kind == "insert":
        return content[:place] + draw(st.binary(max_size=20)) + content[place:]
    if kind == "repeat":
        return content[:place] + content[:place]
    changed = bytearray(content)
    for where, value in draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=8)):
        changed[where] = value
    return bytes(changed)


VALUES = st.one_of(
    st.sampled_from(
        ["null", "true", "-1", "0", "1e400", "nan", "1000000000000000000000", "${oc.env:HOME}", "???", "[1]"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=20),
)


@given(st.lists(st.tuples(st.sampled_from([*flat_settings(Settings()), "data", "x.y"]), VALUES), max_size=4))
@fuzz(400)
def test_settings(pairs):
    attempt(lambda: load_settings(None, [f"{key}={value}" for key, value in pairs]))


@given(data=st.data())
@fuzz(250)
def test_settings_files(data, repository, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(data.draw(damaged((repository / "recipes" / "folder.yaml").read_bytes())))
    attempt(lambda: load_settings(path, []))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (8, 8), 60 * number + 3 * (name == "a")).save(folder / name / f"{number}.png")
    return folder


@given(data=st.data())
@fuzz(250)
def test_metadata_files(data, pictures):
    text = b"file_name,label,contributor,license\na/0.png,x,Ann,CC0\nb/1.png,y,Bob,\n"
    (pictures / "metadata.csv").write_bytes(data.draw(damaged(text)))
    attempt(lambda: load_image_folder(pictures, 8))


def image_bytes(kind: str, mode: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [image_bytes(*pair) for pair in [("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("GIF", "P"), ("TIFF", "LA")]]
IMAGES += [
    image_bytes(*pair) for pair in [("BMP", "L"), ("WEBP", "RGB"), ("PPM", "L"), ("TGA", "RGB"), ("ICO", "RGBA")]
]


@given(data=st.data())
@fuzz(400)
def test_images(data, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(data.draw(st.sampled_from(IMAGES).flatmap(damaged)))
    attempt(lambda: read_image(path, image_size=8, channels=3))


@given(data=st.data())
@fuzz(100)
def test_packed_files(data, tmp_path):
    images = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 3]) + bytes(range(18))
    labels = bytes([0, 0, 8, 1, 0, 0, 0, 2, 0, 1])
    (tmp_path / "train-images-idx3-ubyte").write_bytes(data.draw(damaged(images)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(data.draw(damaged(labels)))
    attempt(lambda: read_idx_folder(tmp_path, "MNIST"))


@given(data=st.data())
@fuzz(150)
def test_manifests(data, trained_root, tmp_path):
    path = tmp_path / "manifest.parquet"
    path.write_bytes(data.draw(damaged((trained_root / "manifest.parquet").read_bytes())))
    attempt(lambda: Manifest.load(path))


@given(data=st.data())
@fuzz(150)
def test_logs_and_json(data, trained_root, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(data.draw(damaged((trained_root / "metrics.jsonl").read_bytes()[:2000])))
    attempt(lambda: read_metrics(path))
    attempt(lambda: read_json(path, "mend it"))


@pytest.fixture(scope="module")
def sampled(trained_root, tmp_path_factory, run_recipe):
    root = shutil.copytree(trained_root, tmp_path_factory.mktemp("sampled") / "run")
    arguments = ("--num-images", 3, "--top-k", 3, "--steps", 10)
    assert run_recipe("generate_and_attribute", "--run", root, *arguments) == 0
    return RunFolder(root)


@given(data=st.data())
@fuzz(150)
def test_traces(data, sampled, tmp_path):
    path = tmp_path / "part-0.parquet"
    path.write_bytes(data.draw(damaged((sampled.traces / "part-0.parquet").read_bytes())))
    attempt(lambda: read_parts(tmp_path, ["sample", "rank"]))


def damage_one(data, folder: Path, copy: Path) -> None:
    """Damage one file of a copy of a folder, and seal it again."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    name = data.draw(st.sampled_from([name for name in names if name.name != "sha256.json"]))
    (copy / name).write_bytes(data.draw(damaged((folder / name).read_bytes())))
    seal(copy)


@given(data=st.data())
@fuzz(100)
def test_pipelines(data, trained_root, tmp_path):
    damage_one(data, trained_root / "pipeline", tmp_path / "pipeline")
    attempt(lambda: ProvenancePipeline.from_pretrained(tmp_path / "pipeline"))


@pytest.fixture
def trainer(accelerator, trained_root):
    run = RunFolder(trained_root)
    chosen = load_settings(run.config, [])
    data = build.open_data(chosen, run)
    return build.make_trainer(chosen, data, accelerator), build.made_by(chosen, data)


@given(data=st.data())
@fuzz(100)
def test_checkpoints(data, trainer, trained_root, tmp_path):
    damage_one(data, trained_root / "checkpoints" / "step-000020", tmp_path / "checkpoints" / "step-000020")
    attempt(lambda: resume_latest(trainer[0], tmp_path / "checkpoints", trainer[1]))
