"""Read videos and their sound with ffmpeg."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np

from deployments.engine.videos import Sound

_SOUND = re.compile(r"Audio: (\w+).*?, (\d+) Hz, (mono|stereo)")


def read_mp4(file: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Decode an MP4; return ffmpeg's metadata and the frames."""
    reader = imageio_ffmpeg.read_frames(file)
    metadata: dict[str, Any] = next(reader)  # type: ignore[assignment]
    width, height = metadata["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    return metadata, np.stack(frames)


def read_sound(file: Path) -> tuple[str, Sound] | None:
    """Return the codec's name and the decoded sound of a file; None without sound."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(file), "-vn", "-f", "f32le", "-"]
    done = subprocess.run(command, capture_output=True)
    match = _SOUND.search(done.stderr.decode())
    if match is None:
        return None
    codec, rate, channels = match.groups()
    samples = np.frombuffer(done.stdout, "<f4").reshape(-1, {"mono": 1, "stereo": 2}[channels])
    return codec, Sound(samples.T, int(rate))
