"""Writes videos to files frame by frame, without a second copy of all frames. Imports no torch."""

from __future__ import annotations

import wave
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import imageio_ffmpeg
import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True)
class Sound:
    """Samples float32 [channels, samples] in [-1, 1], and `rate`, the number of samples per second."""

    samples: np.ndarray
    rate: int


def write_webp(frames: np.ndarray, fps: int, path: Path, moved: Callable[[], None]) -> None:
    """Write an animated WEBP as the reference server does: Pillow's default quality, in an endless loop.

    `frames` is uint8, F x H x W x 3. Each frame is shown for a whole number of milliseconds. `moved` is
    called before each frame but the first and may raise to stop.
    """
    first, rest = Image.fromarray(frames[0]), _Frames(frames[1:], moved)
    first.save(path, "WEBP", save_all=True, append_images=[rest], duration=int(1000 / fps), loop=0)


def write_mp4(
    frames: np.ndarray, fps: int, path: Path, moved: Callable[[], None], sound: Sound | None = None
) -> None:
    """Write an MP4 as the reference server does: H.264 in 4:2:0, otherwise with libx264's defaults.

    `frames` is uint8, F x H x W x 3, with even height and width. Sound becomes AAC at its own rate. `moved`
    is called after each frame and may raise to stop. Raises `OSError` if ffmpeg fails.
    """
    with TemporaryDirectory(prefix="lora-serve-") as folder:
        audio = Path(folder, "sound.wav") if sound else None
        if audio and sound:
            _write_wav(sound, audio)
        _write_mp4(frames, fps, path, moved, audio)


def _write_mp4(
    frames: np.ndarray, fps: int, path: Path, moved: Callable[[], None], audio: Path | None
) -> None:
    _, height, width, _ = frames.shape
    # `quality` None selects libx264's default; the parameter's type does not allow it, hence Any.
    options: Any = {"codec": "libx264", "quality": None, "macro_block_size": 1, "ffmpeg_log_level": "error"}
    if audio:
        options |= {"audio_path": str(audio), "audio_codec": "aac"}
    writer = imageio_ffmpeg.write_frames(path, (width, height), fps=fps, **options)
    with closing(writer):
        next(writer)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
            moved()
    # The writer raises nothing if ffmpeg fails at the end, for example when the disk is full.
    try:
        written, _ = imageio_ffmpeg.count_frames_and_secs(path)
    except RuntimeError as error:
        raise OSError("ffmpeg wrote no video") from error
    if written != len(frames):
        raise OSError(f"ffmpeg wrote {written} of {len(frames)} frames")


def _write_wav(sound: Sound, path: Path) -> None:
    """Write sound as a WAV file with 16 bits per sample and interleaved channels."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(sound.samples))
        file.setsampwidth(2)
        file.setframerate(sound.rate)
        file.writeframes((sound.samples.T.clip(-1, 1) * 32767).round().astype("<i2").tobytes())


class _Frames:
    """Frames in the form that Pillow reads: `seek` selects a frame, and other attributes are that frame's."""

    def __init__(self, frames: np.ndarray, moved: Callable[[], None]) -> None:
        self._frames = frames
        self._moved = moved
        self.n_frames = len(frames)

    def seek(self, frame: int) -> None:
        self._moved()
        self._frame = Image.fromarray(self._frames[frame])

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of an image
        return getattr(self._frame, name)
