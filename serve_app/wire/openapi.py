"""Examples and links that `/openapi.json` has in addition to what FastAPI generates."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI

_ID = "7d0c0b3e-6b0e-4b8e-9d5c-0f6b7c1f2a34"
_REQUEST_URL = f"http://127.0.0.1:8000/v1/requests/{_ID}"
_OUTPUT = f"/outputs/{_ID}/1/0"
_CREATED, _FINISHED = "2026-11-20T23:52:30.679001Z", "2026-11-20T23:52:37.101215Z"

_LORA = {"path": "my_style.safetensors", "network_multiplier": 0.8}

_STATUS = {
    "request_id": _ID,
    "status": "in_progress",
    "created_at": _CREATED,
    "started_at": "2026-11-20T23:52:30.704992Z",
    "finished_at": None,
    "error": None,
    "error_code": None,
    "progress": {"prompt": 0, "prompts": 1, "step": 7, "steps": 25, "phase": "step"},
    "queue_position": None,
    "attempts": 1,
    "cancel_requested": False,
}

_MODEL = {
    "id": "flux",
    "base_model": "black-forest-labs/FLUX.1-dev",
    "resolution_divisor": 16,
    "default_steps": 25,
    "default_guidance_scale": 4.0,
    "requires_control_image": False,
    "is_video_model": False,
    "default_num_frames": None,
    "default_fps": None,
    "title": "FLUX.1 dev",
    "control_images": {"least": 0, "most": 0},
    "negative_prompt": False,
    "default_width": 1024,
    "default_height": 1024,
    "gated": True,
    "licence": "FLUX.1 dev non-commercial",
    "output_formats": ["jpeg", "png", "webp"],
    "preview_differs": None,
    "max_loras": 1,
    "transformers": [],
    "resolutions": ["Default"],
    "options": {},
}

_REQUEST = {
    "model": "flux",
    "loras": [_LORA],
    "prompts": [{"prompt": "[trigger], a red fox", "width": 1024, "height": 768, "seed": 42}],
    "trigger_word": "p5x",
    "output_format": "png",
}

_RESULT = {
    "request_id": _ID,
    "status": "succeeded",
    "outputs": {
        "images": [
            {
                "format": "png",
                "width": 1024,
                "height": 768,
                "file_path": f"/srv/lora-serve{_OUTPUT}.png",
                "seed": 42,
                "url": f"http://127.0.0.1:8000{_OUTPUT}.png",
                "sha256": "3f1c" * 16,
                "bytes": 1203345,
                "manifest_url": f"http://127.0.0.1:8000{_OUTPUT}.json",
            }
        ],
        "videos": [],
    },
    "error": None,
    "created_at": _CREATED,
    "finished_at": _FINISHED,
    "metadata": {
        "model": "flux",
        "inference_time": 6.3,
        "timings": {"fetch": 0.1, "adapters": 0.04, "prompts": [6.1]},
        "warnings": [],
    },
}

_BATCH = {
    "batch_id": _ID,
    "total": 1,
    "counts": {"in_queue": 0, "in_progress": 0, "succeeded": 1, "failed": 0, "canceled": 0},
}

_BATCH_RESULT = {
    **_RESULT,
    "error_code": None,
    "started_at": _CREATED,
    "attempts": 1,
    "loras": [{**_LORA, "transformer": None}],
    "prompts": [
        {
            "prompt": "p5x, a red fox",
            "neg": "",
            "width": 1024,
            "height": 768,
            "sample_steps": 25,
            "guidance_scale": 4.0,
            "seed": 42,
            "num_frames": None,
            "fps": None,
        }
    ],
}

EXAMPLES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "InferenceRequest": _REQUEST,
        "SubmitAnswer": {
            "request_id": _ID,
            "status": "queued",
            "status_url": f"{_REQUEST_URL}/status",
            "result_url": f"{_REQUEST_URL}/result",
            "created_at": _CREATED,
            "warnings": [],
        },
        "StatusAnswer": _STATUS,
        "ListAnswer": {
            "requests": [{**_STATUS, "model": "flux", "batch_id": None}],
            "next_cursor": "AAAAAAAAASw",
        },
        "ResultAnswer": _RESULT,
        "BatchRequest": {"requests": [_REQUEST]},
        "BatchSubmitAnswer": {
            "batch_id": _ID,
            "batch_url": f"http://127.0.0.1:8000/v1/batches/{_ID}",
            "request_ids": [_ID],
            "warnings": [],
        },
        "BatchAnswer": _BATCH,
        "BatchRetryAnswer": {**_BATCH, "retried": 0},
        "BatchResultsAnswer": {"results": [_BATCH_RESULT], "next_cursor": None},
        "ModelsAnswer": {"models": [_MODEL]},
        "InspectRequest": {"path": "my_style.safetensors"},
        "Inspection": {
            "dialect": "peft",
            "tensors": 988,
            "modules": 494,
            "dtypes": {"BF16": 988},
            "ranks": [16],
            "alphas": [],
            "alpha_tensors": 0,
            "metadata": {"name": "my_style"},
            "models": [
                {
                    "model": "flux",
                    "fit": "whole",
                    "matched": 494,
                    "unmatched": 0,
                    "misfits": 0,
                    "examples": [],
                }
            ],
            "fitting_models": ["flux"],
        },
        "ImagesAnswer": {
            "created": 1795219950,
            "data": [{"url": f"http://127.0.0.1:8000{_OUTPUT}.jpg", "seed": 42}],
            "output_format": "jpeg",
            "size": "1024x768",
            "request_id": _ID,
            "warnings": [],
        },
        "HealthAnswer": {"status": "healthy"},
        "ReadyAnswer": {"status": "ready"},
    }
)
"""An example of each request and response body, by schema name."""

_LINKED = ("read_status", "read_result", "cancel_request")
"""Operations that take the id which a submission returns."""


class DescribedApp(FastAPI):
    """An application whose OpenAPI description has our examples and links."""

    def openapi(self) -> dict[str, Any]:
        """Return the description. Our additions are made on the first call."""
        if self.openapi_schema is None:
            self.openapi_schema = _with_additions(super().openapi())
        return super().openapi()


def _whole_numbers(part: Any) -> Any:  # noqa: ANN401 - any JSON
    """Turn whole floats into integers: FastAPI writes a bound such as 2**64 as a float, which rounds it."""
    if isinstance(part, dict):
        return {name: _whole_numbers(value) for name, value in part.items()}
    if isinstance(part, list):
        return [_whole_numbers(value) for value in part]
    return int(part) if isinstance(part, float) and part.is_integer() else part


def _with_additions(generated: dict[str, Any]) -> dict[str, Any]:
    description = _whole_numbers(generated)
    for name, schema in description["components"]["schemas"].items():
        if name in EXAMPLES:
            schema["examples"] = [EXAMPLES[name]]
    submitted = description["paths"]["/v1/inference"]["post"]["responses"]["200"]
    submitted["links"] = {
        operation: {"operationId": operation, "parameters": {"request_id": "$response.body#/request_id"}}
        for operation in _LINKED
    }
    return description
