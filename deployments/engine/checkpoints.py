"""Locates a model's files: in a directory of `org--name` folders, else on the hub. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from cluster.failures import FailureCode, JobFailure
from deployments.catalog import Checkpoint, Part

LOCAL = "local"
"""Revision reported for a checkpoint in a plain directory."""

_INDEX = "model_index.json"

_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja")
"""Configs and tokenizers. A star in these patterns also matches slashes; `ignore_patterns` excludes those."""


@dataclass(frozen=True, slots=True)
class Located:
    """A checkpoint on this node. `revision` is the hub's commit or `local`, `variant` that of the files."""

    directory: Path
    revision: str
    variant: str | None


class Checkpoints:
    """Looks up repositories in `root`, then on the hub. Hub files are cached in `cache_dir`."""

    def __init__(self, root: Path | None, cache_dir: Path | None) -> None:
        self._root = root
        self._cache_dir = cache_dir

    def locate(self, checkpoint: Checkpoint, *, without: Collection[str] = ()) -> Located:
        """Return the directory of a repository in diffusers layout. Download only the needed files.

        `without` names components that are not needed. Raises `JobFailure` (MODEL_LOAD_FAILED).
        """
        return self._locate(checkpoint, lambda: self._download(checkpoint, without))

    def locate_part(self, part: Part) -> Located:
        """Return the directory of one component's files. Download only that folder.

        Raises `JobFailure` (MODEL_LOAD_FAILED).
        """
        located = self._locate(part.checkpoint, lambda: self._download_part(part))
        return replace(located, directory=located.directory / part.folder)

    def locate_lora(self, checkpoint: Checkpoint) -> Path:
        """Return the one `.safetensors` file at the top of a repository. Raises `JobFailure`."""

        def download() -> Located:
            directory = snapshot_download(
                checkpoint.repo,
                revision=checkpoint.revision,
                cache_dir=self._cache_dir,
                allow_patterns=["*.safetensors"],
                ignore_patterns=["*/*"],
            )
            return Located(Path(directory), Path(directory).name, None)

        directory = self._locate(checkpoint, download).directory
        try:
            (file,) = directory.glob("*.safetensors")
        except ValueError as error:
            raise _not_found(
                f"{checkpoint.repo}: expected exactly one .safetensors file in {directory}"
            ) from error
        return file

    def _locate(self, checkpoint: Checkpoint, download: Callable[[], Located]) -> Located:
        folder = checkpoint.repo.replace("/", "--")
        if self._root is not None and (self._root / folder).is_dir():
            directory = self._root / folder
            return Located(directory, LOCAL, _variant(directory, checkpoint.variant))
        searched = f"no folder {folder} in {self._root}" if self._root else "no checkpoint directory is set"
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise _not_found(f"{checkpoint.repo}: {searched}, and HF_HUB_OFFLINE is set")
        try:
            return download()
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise _not_found(f"{checkpoint.repo}: {searched}, and the hub says: {error}") from error

    def _download_part(self, part: Part) -> Located:
        path = f"{part.folder}/" if part.folder else ""
        directory = snapshot_download(
            part.checkpoint.repo,
            revision=part.checkpoint.revision,
            cache_dir=self._cache_dir,
            # The names that diffusers and transformers use. Mistral's repositories also hold a second copy.
            allow_patterns=[f"{path}{kind}" for kind in (*_TEXTS, "*model*.safetensors")],
            ignore_patterns=[f"{path}*/*"],
        )
        return Located(Path(directory), Path(directory).name, None)

    def _download(self, checkpoint: Checkpoint, without: Collection[str]) -> Located:
        repo, variant = checkpoint.repo, checkpoint.variant
        index = Path(hf_hub_download(repo, _INDEX, revision=checkpoint.revision, cache_dir=self._cache_dir))
        components = [
            name
            for name, entry in json.loads(index.read_text()).items()
            if isinstance(entry, list) and entry[0] and name not in without
        ]
        # A snapshot's folder is named after its commit. Pin it, so a moving branch cannot mix two revisions.
        directory, commit = index.parent, index.parent.name
        for weights in [f"*.{variant}*.safetensors", "*.safetensors"] if variant else ["*.safetensors"]:
            wanted = [f"{name}/{kind}" for name in components for kind in (*_TEXTS, weights)]
            snapshot_download(
                repo,
                revision=commit,
                cache_dir=self._cache_dir,
                allow_patterns=wanted,
                ignore_patterns=["*/*/*", *checkpoint.without],
            )
            if any(directory.glob(f"*/{weights}")):
                break
        return Located(directory, commit, _variant(directory, variant))


def _not_found(message: str) -> JobFailure:
    return JobFailure(FailureCode.MODEL_LOAD_FAILED, message, retry=True)


def _variant(directory: Path, variant: str | None) -> str | None:
    """Return the variant if the directory has files of it, else None: some mirrors hold only plain files."""
    return variant if variant and any(directory.glob(f"*/*.{variant}*.safetensors")) else None
