"""Oracle: schemathesis asks what the OpenAPI document allows and what it forbids, and gets only what it promises."""

from collections import Counter

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from onebit.serve.service import Options
from serve.running import running, tiny_llm

READERS = ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"]
TELLERS = ["/v1/models", "/v1/models/{model}", "/health", "/ready", "/metrics"]
ASKED = [(path, "POST", mode) for path in READERS for mode in GenerationMode]
ASKED += [(path, "GET", GenerationMode.POSITIVE) for path in TELLERS]


@pytest.fixture(scope="module")
def document(server):
    load_all_checks()
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


@pytest.mark.parametrize(("path", "method", "mode"), ASKED)
def test_answers_are_those_that_are_promised(document, path, method, mode):
    """No status, content type or body beyond the document, no 5xx, and no body accepted that it forbids."""
    statuses = Counter()

    @hypothesis.settings(
        max_examples=8,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(document[path][method].as_strategy(generation_mode=mode))
    def ask(case):
        answer = case.call()
        statuses[answer.status_code] += 1
        # The document cannot tell all that a model refuses, as a prompt that is longer than its context.
        case.validate_response(answer, excluded_checks=[positive_data_acceptance])

    ask()
    assert set(statuses) <= ({400} if mode is GenerationMode.NEGATIVE else {200, 400, 404})


def test_every_route_is_asked(document):
    assert set(document.raw_schema["paths"]) == {path for path, _, _ in ASKED}


def test_the_document_tells_of_keys():
    def told(options):
        with running({"tiny": tiny_llm()}, options) as server:
            answer = server.get("/openapi.json", headers={"authorization": "Bearer key"}).json()
        return {
            path
            for path, operations in answer["paths"].items()
            for operation in operations.values()
            if "security" in operation
        }

    assert told(Options(cache_bytes=2**20)) == set()
    assert told(Options(cache_bytes=2**20, api_keys=("key",))) == {*READERS, *TELLERS} - {"/health", "/ready"}
