"""All that an image may be given as, and what is refused, each with its reason."""

from __future__ import annotations

import array
import io
import mmap
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from himix_edge.errors import ConfigError, ImageError
from himix_edge.runtimes import image_sources
from himix_edge.runtimes.image_sources import picture_argument
from himix_edge.runtimes.preprocess import load_image

LEVELS = np.random.default_rng(3).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def png(levels: np.ndarray[Any, Any] = LEVELS) -> bytes:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    return file.getvalue()


DATA = png()


def same(source: Any, expected: np.ndarray[Any, Any] = LEVELS, **options: Any) -> None:
    np.testing.assert_array_equal(np.asarray(load_image(source, **options)), expected)


def test_bytes_likes() -> None:
    with mmap.mmap(-1, len(DATA)) as mapped:
        mapped.write(DATA)
        mapped.seek(0)
        for source in (
            bytearray(DATA),
            memoryview(DATA),
            array.array("B", DATA),
            mapped,
        ):
            same(source)
    every_other = bytearray(2 * len(DATA))
    every_other[::2] = DATA
    same(memoryview(every_other)[::2])


def test_file_objects_are_read_from_where_they_stand_and_stay_open(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"a head of 16 B.." + DATA)
    for file in (io.BytesIO(path.read_bytes()), path.open("rb"), path.open("rb", buffering=0)):
        file.seek(16)
        same(file)
        assert not file.closed
        assert file.tell() == 16 + len(DATA)
        with pytest.raises(ImageError, match="an empty file"):
            load_image(file)
        file.close()
        with pytest.raises(ImageError, match="closed"):
            load_image(file)


def test_a_file_object_that_reads_little_at_a_time() -> None:
    class Slow:
        def __init__(self) -> None:
            self.left = DATA

        def read(self, size: int = -1, /) -> bytes:
            part, self.left = self.left[: min(size, 7)], self.left[min(size, 7) :]
            return part

    same(Slow())


def test_text_and_asynchronous_files_are_refused(tmp_path: Path) -> None:
    class Asynchronous:
        async def read(self, size: int) -> bytes:
            return DATA[:size]

    path = tmp_path / "a.txt"
    path.write_text("text")
    with path.open() as text, pytest.raises(ImageError, match=r"binary.*found str .*mode \"rb\""):
        load_image(text)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"StringIO: expected a binary file object"):
        load_image(io.StringIO("text"))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="found coroutine from read"):
        load_image(Asynchronous())  # type: ignore[arg-type]


def test_a_file_object_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        def read(self, size: int = -1, /) -> bytes:
            return bytes(size)

    monkeypatch.setattr(image_sources, "MAX_BYTES", 3 << 20)
    with pytest.raises(ImageError, match="too large: expected at most 3 MiB"):
        load_image(Endless())


def test_a_pipe_by_its_path(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(DATA))
    writer.start()
    same(pipe)
    writer.join()


def test_a_path_that_speaks_bytes(tmp_path: Path) -> None:
    class OldPath:
        def __fspath__(self) -> bytes:
            return os.fsencode(tmp_path / "a.png")

    (tmp_path / "a.png").write_bytes(DATA)
    same(OldPath())


# arrays


def test_bgr_is_opencvs_order() -> None:
    same(np.ascontiguousarray(LEVELS[:, :, ::-1]), channels="BGR")
    same(LEVELS[:, :, ::-1], channels="BGR")
    alpha = np.full((6, 9, 1), 255, np.uint8)
    same(np.concatenate([LEVELS[:, :, ::-1], alpha], 2), channels="BGR")
    half = np.array([[[0, 0, 255, 51]]], np.uint8)  # a fifth of red, on white
    same(half, np.array([[[255, 204, 204]]]), channels="BGR")
    grey = LEVELS[:, :, 0]
    same(grey, np.stack([grey] * 3, -1), channels="BGR")


def test_channels_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected RGB or BGR, found 'bgr'.*mean 'BGR'"):
        load_image(LEVELS, "bgr")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="order of channels is unknown"):
        load_image(DATA, None)  # type: ignore[arg-type]
    for source in (DATA, tmp_path / "a.png", Image.fromarray(LEVELS), io.BytesIO(DATA)):
        with pytest.raises(ConfigError, match="channels BGR means nothing here: expected an array"):
            load_image(source, "BGR")


def test_what_can_be_an_array() -> None:
    class Frame:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
            return LEVELS

    same(torch.from_numpy(LEVELS))
    same(torch.from_numpy(LEVELS.transpose(2, 0, 1).copy()).permute(1, 2, 0))
    same(Frame())
    same(Frame(), LEVELS[:, :, ::-1], channels="BGR")
    same(memoryview(LEVELS.data))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LEVELS.transpose(2, 0, 1), r"found uint8 \[3, 6, 9\].*transpose\(1, 2, 0\)"),
        (torch.zeros(3, 8, 9, dtype=torch.uint8), r"permute\(1, 2, 0\)"),
        (torch.zeros(1, 3, 8, 9), r"float32 \[1, 3, 8, 9\].*array\[0\], and put.*and scale it"),
        (LEVELS[None], r"array\[0\]"),
        (LEVELS / 255, "float64.*scale it to 0..255"),
        (torch.zeros(8, 9, 3, requires_grad=True), "this Tensor can't be made an array.*detach"),
        (np.uint8(7), r"this array is no image.*found uint8 \[\]"),
        (7, "this is no image.*found int"),
        (None, "this is no image.*found NoneType"),
        ([[1, 2]], "this is no image.*found list"),
    ],
)
def test_what_is_no_image(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)


# paths and addresses


@pytest.mark.parametrize(
    ("url", "fix"),
    [
        ("http://example.org/a.png", "download it"),
        ("HTTPS://example.org/a.png", "download it"),
        ("s3://bucket/a.png", "download it"),
        ("file:///tmp/a%20b.png", r"give the path: /tmp/a b\.png"),
        ("data:image/png;base64,iVBORw0KGgo=", "base64.b64decode"),
        (Path("https://example.org/a.png"), "download it"),
    ],
)
def test_urls_are_refused_and_nothing_is_fetched(url: Any, fix: str) -> None:
    with pytest.raises(ImageError, match=f"is a URL: .*fetches nothing.*{fix}"):
        load_image(url)


def test_names_that_are_no_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.png", "http:.png", "-", "data:x"):
        (tmp_path / name).write_bytes(DATA)
        same(name)
    (tmp_path / "http:").mkdir()
    (tmp_path / "http:" / "a.png").write_bytes(DATA)
    same("http://a.png")
    with pytest.raises(ImageError, match="No such file"):
        load_image("c:/a.png")


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for source, message in (
        ("", "no path to an image: .*found nothing"),
        ("a\0b.png", "a NUL character"),
        (tmp_path, "expected a file, found Is a directory.*give a picture in it"),
        ("x" * 5000, r"image x+\.\.\. can't be read: found File name too long"),
        (tmp_path / "gone.png", "No such file or directory.*check the path"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(source)


# the command line's argument


class Stdin(io.TextIOWrapper):
    def __init__(self, data: bytes, is_terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data))
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def test_a_dash_is_what_stdin_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(DATA))
    same(picture_argument("-"))
    assert picture_argument("a.png") == "a.png"
    assert picture_argument("./-") == "./-"


def test_stdin_without_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"", is_terminal=True))
    with pytest.raises(ImageError, match=r"found a terminal.*cat picture\.png"):
        picture_argument("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ImageError, match="found nothing"):
        picture_argument("-")
    monkeypatch.setattr(sys, "stdin", Stdin(b""))
    with pytest.raises(ImageError, match="an empty file"):
        load_image(picture_argument("-"))
