"""Checks the frame count and frame rate of requests for video models."""

from __future__ import annotations

from deployments.catalog import ModelSpec, Video
from serve_app.wire.refusals import Code, Refusal
from serve_app.wire.requests import PromptItem


def check_video(prompt: PromptItem, index: int, model: ModelSpec) -> None:
    """Raise `Refusal` if the model cannot make a video with the frame count or rate of prompt `index`."""
    video = model.video
    if video is None:
        return
    if prompt.num_frames is not None and prompt.num_frames < video.fewest:
        raise Refusal(Code.NUM_FRAMES_NOT_SUPPORTED, model=model.id, prompt_index=index, least=video.fewest)
    if video.other_fps == "refused" and prompt.fps not in (None, video.fps):
        raise Refusal(Code.FPS_NOT_SUPPORTED, model=model.id, prompt_index=index, supported=video.fps)


def frames_per_second(prompt: PromptItem, video: Video) -> int:
    """Return the frame rate of a prompt's video."""
    return video.fps if video.other_fps == "ignored" else prompt.fps or video.fps
