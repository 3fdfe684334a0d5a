"""Requests made from the service's own OpenAPI schema, valid ones and broken ones, answered as that schema promises."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import positive_data_acceptance

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("local_ray")]

OPERATIONS = [
    ("/v1/score", "POST"),
    ("/v1/moderations", "POST"),
    ("/v1alpha1/comments:analyze", "POST"),
    ("/v1alpha1/comments:suggestscore", "POST"),
    ("/$discovery/rest", "GET"),
    ("/healthz", "GET"),
    ("/readyz", "GET"),
    ("/metrics", "GET"),
]


@pytest.fixture(scope="package")
def schema(client: httpx.Client) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


def test_no_operation_is_left_out(schema: BaseSchema) -> None:
    found = {(found.ok().path, found.ok().method.upper()) for found in schema.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        (*operation, mode)
        for operation in OPERATIONS
        for mode in GenerationMode
        if mode.is_positive or "POST" in operation
    ],
)
def test_every_answer_is_one_the_schema_promises(
    schema: BaseSchema, path: str, method: str, mode: GenerationMode
) -> None:
    if method == "GET" and mode.is_negative:
        pytest.skip("nothing can be wrong with a request without parameters")
    # Valid by the schema is not always meant: `{}`, an image, a name of an attribute that nobody provides are refused.
    excluded = [positive_data_acceptance] if method == "POST" else []

    @settings(
        max_examples=50,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def fuzz(case: Case) -> None:
        case.call_and_validate(excluded_checks=excluded)

    fuzz()
