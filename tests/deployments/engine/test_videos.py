"""Video files: we write them, ffmpeg and Pillow read them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deployments.engine.media import Media, save
from deployments.engine.videos import Sound
from deployments.spec.formats import VideoFormat
from tests.support.videos import read_mp4, read_sound

FPS = 12

# A disc that moves over a gradient: easy content for video codecs.
ROWS, COLUMNS = np.mgrid[:48, :80]
FRAMES = np.stack(
    [
        np.stack(
            [COLUMNS * 3, ROWS * 5, np.where((COLUMNS - 8 * n) ** 2 + (ROWS - 24) ** 2 < 150, 220, 30)],
            axis=-1,
        ).astype(np.uint8)
        for n in range(9)
    ]
)


class Stopped(Exception):
    """Raised between two frames."""


def written(frames: np.ndarray, format: VideoFormat, folder: Path, fps: int = FPS) -> tuple[Path, int]:
    """Save a video; return its file and the number of progress calls."""
    moves: list[None] = []
    file = folder / f"0.{format}"
    save(Media(frames, fps=fps), format, {}, file, lambda: moves.append(None))
    return file, len(moves)


def check(frame: np.ndarray, index: int) -> None:
    """Assert that a decoded frame matches `FRAMES[index]` best, up to the loss of the codec."""
    differences = np.abs(FRAMES.astype(int) - frame).mean(axis=(1, 2, 3))
    assert differences.argmin() == index
    assert differences[index] < 5


def test_measures() -> None:
    measures = {"width": 80, "height": 48, "num_frames": 9, "fps": FPS}
    assert Media(FRAMES, fps=FPS).measures == measures


@pytest.mark.parametrize("count", [1, 2, 9])
def test_webp_is_the_file_of_the_reference_server(tmp_path: Path, count: int) -> None:
    file, _ = written(FRAMES[:count], "webp", tmp_path)
    images = [Image.fromarray(frame) for frame in FRAMES[:count]]
    images[0].save(tmp_path / "its.webp", save_all=True, append_images=images[1:], duration=83, loop=0)
    assert file.read_bytes() == (tmp_path / "its.webp").read_bytes()


def test_webp_decodes_to_the_frames(tmp_path: Path) -> None:
    file, moves = written(FRAMES, "webp", tmp_path)
    with Image.open(file) as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (9, (80, 48), 0)  # type: ignore[attr-defined]
        for index in range(len(FRAMES)):
            image.seek(index)
            check(np.asarray(image.convert("RGB")), index)
            assert image.info["duration"] == 1000 // FPS
    assert moves == len(FRAMES) - 1


@pytest.mark.parametrize("fps", [1, FPS, 24, 120])
def test_mp4_decodes_to_the_frames(tmp_path: Path, fps: int) -> None:
    file, moves = written(FRAMES, "mp4", tmp_path, fps)
    metadata, frames = read_mp4(file)
    assert (metadata["codec"], metadata["pix_fmt"].partition("(")[0]) == ("h264", "yuv420p")
    assert (metadata["size"], metadata["fps"]) == ((80, 48), fps)
    assert frames.shape == FRAMES.shape
    for index, frame in enumerate(frames):
        check(frame, index)
    assert moves == len(FRAMES)


def test_mp4_has_x264_s_own_settings(tmp_path: Path) -> None:
    """x264 records its settings in the file: crf 23 and the preset medium."""
    file, _ = written(FRAMES, "mp4", tmp_path)
    (settings,) = re.findall(rb"options: ([ -~]+)", file.read_bytes())
    assert {b"crf=23.0", b"me=hex", b"subme=7", b"ref=3"} <= set(settings.split())


def two_tones(rate: int) -> Sound:
    """Return 0.75 s of sound, as long as the frames: 440 Hz on the left, a softer 660 Hz on the right."""
    seconds = np.arange(rate * 3 // 4) / rate
    tones = [0.6 * np.sin(2 * np.pi * 440 * seconds), 0.3 * np.sin(2 * np.pi * 660 * seconds)]
    return Sound(np.stack(tones).astype(np.float32), rate)


@pytest.mark.parametrize("rate", [24_000, 32_000, 48_000])
def test_the_sound_of_both_channels_decodes(tmp_path: Path, rate: int) -> None:
    sound, file = two_tones(rate), tmp_path / "0.mp4"
    save(Media(FRAMES, fps=FPS, sound=sound), "mp4", {}, file)
    decoded = read_sound(file)
    assert decoded is not None
    codec, output = decoded
    assert (codec, output.rate, len(output.samples)) == ("aac", rate, 2)
    # AAC has frames of 1024 samples; the last one is padded with silence.
    length = sound.samples.shape[1]
    assert length <= output.samples.shape[1] < length + 2 * 1024
    assert np.abs(output.samples[:, :length] - sound.samples).mean() < 0.01
    metadata, frames = read_mp4(file)
    assert (metadata["size"], metadata["fps"], len(frames)) == ((80, 48), FPS, len(FRAMES))
    check(frames[4], 4)


def test_sound_beyond_full_scale_is_cut_off(tmp_path: Path) -> None:
    tones = two_tones(24_000)
    loud = replace(tones, samples=tones.samples * 2)
    save(Media(FRAMES, fps=FPS, sound=loud), "mp4", {}, tmp_path / "0.mp4")
    decoded = read_sound(tmp_path / "0.mp4")
    assert decoded is not None
    expected = loud.samples.clip(-1, 1)
    assert np.abs(decoded[1].samples[:, : expected.shape[1]] - expected).mean() < 0.1


def test_without_sound_there_is_no_track_for_it(tmp_path: Path) -> None:
    assert read_sound(written(FRAMES, "mp4", tmp_path)[0]) is None


def test_a_video_of_one_frame(tmp_path: Path) -> None:
    assert read_mp4(written(FRAMES[:1], "mp4", tmp_path)[0])[1].shape == (1, 48, 80, 3)


@pytest.mark.parametrize("format", ["webp", "mp4"])
def test_between_two_frames_it_can_be_stopped(tmp_path: Path, format: VideoFormat) -> None:
    seen: list[None] = []

    def stop() -> None:
        seen.append(None)
        if len(seen) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        save(Media(FRAMES, fps=FPS), format, {}, tmp_path / f"0.{format}", stop)
    assert len(seen) == 3


@pytest.mark.parametrize("format", ["webp", "mp4"])
def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path, format: VideoFormat) -> None:
    with pytest.raises(OSError):
        save(Media(FRAMES, fps=FPS), format, {}, tmp_path / "nowhere" / f"0.{format}")


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """ffmpeg writes such a short video only after it has read every frame."""
    (tmp_path / "0.mp4").symlink_to("/dev/full")
    with pytest.raises(OSError):
        save(Media(FRAMES, fps=FPS), "mp4", {}, tmp_path / "0.mp4")
