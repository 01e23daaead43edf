"""Response bodies of the batch routes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel

from cluster.jobs.model import Job, JobState
from serve_app.wire.answers import Outputs, ResultAnswer, StatusAnswer


class BatchSubmitAnswer(BaseModel):
    """Response to `POST /v1/batches`. Ids are in request order; warnings name a request by index."""

    batch_id: str
    batch_url: str
    request_ids: list[str]
    warnings: list[str]


class BatchCounts(BaseModel):
    """How many requests of a batch are in each state."""

    in_queue: int
    in_progress: int
    succeeded: int
    failed: int
    canceled: int


class BatchAnswer(BaseModel):
    """Response to `GET /v1/batches/{id}`."""

    batch_id: str
    total: int
    counts: BatchCounts

    @classmethod
    def of(cls, batch_id: str, counts: Mapping[JobState, int], **more: Any) -> Self:  # noqa: ANN401 - fields
        """Describe a batch with these counts."""
        return cls(
            batch_id=batch_id, total=sum(counts.values()), counts=BatchCounts.model_validate(counts), **more
        )


class BatchRetryAnswer(BatchAnswer):
    """Response to `POST /v1/batches/{id}/retry`: the new counts, and how many requests were resubmitted."""

    retried: int


class AskedLora(BaseModel):
    """A LoRA as applied. `path` leaves out the query of a URL."""

    path: str
    network_multiplier: float
    transformer: str | None


class AskedPrompt(BaseModel):
    """A prompt as rendered, with every default filled in."""

    prompt: str
    neg: str
    width: int
    height: int
    sample_steps: int
    guidance_scale: float
    seed: int
    num_frames: int | None
    fps: int | None


class BatchResult(ResultAnswer):
    """One request of a batch: its result, some fields of its status, its LoRAs and its prompts."""

    error_code: str | None
    started_at: datetime | None
    attempts: int
    loras: list[AskedLora]
    prompts: list[AskedPrompt]

    @classmethod
    def of(cls, job: Job, outputs: Outputs | None) -> Self:
        """Describe `job` and its outputs."""
        return cls(
            **ResultAnswer.of(job, outputs).model_dump(),
            error_code=job.error_code,
            started_at=StatusAnswer.of(job, None).started_at,
            attempts=job.attempts,
            loras=[AskedLora(**lora, network_multiplier=lora["multiplier"]) for lora in job.spec["loras"]],
            prompts=[
                AskedPrompt(**prompt, sample_steps=prompt["steps"], guidance_scale=prompt["guidance"])
                for prompt in job.spec["prompts"]
            ],
        )


class BatchResultsAnswer(BaseModel):
    """Response to `GET /v1/batches/{id}/results`, oldest first. `next_cursor` is null on the last page."""

    results: list[BatchResult]
    next_cursor: str | None
