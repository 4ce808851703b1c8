"""Requests made from the OpenAPI schema, right and wrong ones: no server error, and answers as the schema says."""

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import Serving

ENDLESS = "/api/events"
CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


@pytest.mark.parametrize(("each", "least"), [(8, 100), pytest.param(400, 5000, marks=pytest.mark.slow)])
def test_no_request_makes_an_error_of_ours(tmp_path, each, least):
    server = Serving(tmp_path, "--max-side", "64", "--max-queue", "8")
    image = server.finished(server.job())["images"][0]["id"]
    schema = schemathesis.openapi.from_url(f"{server.url}/api/openapi.json")
    statuses: Counter[int] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path != ENDLESS:
            run(operation, image, each, statuses)
    assert sum(statuses.values()) >= least
    assert not [status for status in statuses if status >= 500]
    assert {200, 201, 404, 422} <= set(statuses)
    said = server.stop()
    assert "Traceback" not in said, said


def run(operation, image, each, statuses):
    @given(case=operation.as_strategy())
    @settings(max_examples=each, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    def ask(case):
        if "image_id" in case.path_parameters and sum(statuses.values()) % 2:
            case.path_parameters["image_id"] = image  # one that is there, else all would be 404
        if isinstance(case.body, dict) and isinstance(case.body.get("prompt"), str):
            # Small pictures, so that the queue moves.
            case.body = {**case.body, **{key: 1 for key in ("steps", "num_images", "n") if key in case.body}}
        response = case.call(timeout=60)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    ask()
