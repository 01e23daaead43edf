"""Each of the sixty hostile inputs has a test: in this folder by its number, or as listed in `ELSEWHERE`."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]

ELSEWHERE = {
    12: "deployments/loras/sources/test_loras.py::"
    "test_an_unchanged_file_is_downloaded_once_and_a_changed_one_anew",
    20: "deployments/loras/format/test_header.py::test_broken_files",
    31: "parity/test_goldens.py::test_golden",
    36: "cluster/net/test_fetcher.py::test_the_connection_goes_to_the_address_that_was_checked",
    40: "serve_app/background/test_webhooks.py::test_bad_webhooks_are_refused_and_nothing_is_stored",
    41: "serve_app/background/test_webhooks.py::"
    "test_a_receiver_that_fails_is_told_again_and_redelivery_begins_anew",
    48: "serve_app/gateway/test_body_bounds.py::test_a_body_without_length_is_cut_off_while_it_streams",
    49: "serve_app/wire/test_request_types.py::test_a_bad_prompt_field_is_a_422_that_names_it",
    50: "deployments/worker/test_claiming.py::test_out_of_memory_is_tried_once_more",
    51: "serve_app/wire/test_request_types.py::test_a_bad_prompt_field_is_a_422_that_names_it",
    52: "serve_app/wire/test_request_types.py::test_a_bad_prompt_field_is_a_422_that_names_it",
    53: "cluster/test_telemetry.py::test_a_record_is_one_json_line",
    54: "serve_app/wire/test_request_types.py::test_unknown_fields_are_ignored_and_named",
    56: "serve_app/gateway/test_submission.py::test_concurrent_twins_make_one_job",
    57: "serve_app/gateway/test_auth.py::test_anothers_job_looks_like_none",
    58: "serve_app/gateway/test_app.py::test_a_queued_job_is_canceled_at_once",
    59: "cluster/objects/test_s3_faults.py::test_a_bucket_that_is_not_there",
}


def test_none_is_left_out() -> None:
    texts = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    here = re.findall(r'^    "(\d+) |def test_(\d+)_(?:and_(\d+)_)?', texts, re.MULTILINE)
    numbers = {int(number) for found in here for number in found if number}
    assert numbers | ELSEWHERE.keys() == set(range(1, 61))


def test_what_is_tested_elsewhere_is_there() -> None:
    for place in ELSEWHERE.values():
        file, name = place.split("::")
        assert f"def {name}(" in (TESTS / file).read_text(), place
