"""What answers look like, as the OpenAPI document tells it; requests are in `protocol`."""

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(_Body):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Body):
    """An error, as OpenAI tells it."""

    error: Error


class StateBody(_Body):
    """How the server is."""

    status: str


class ModelBody(_Body):
    """A model, or an adapter of one."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    max_model_len: int
    label: str
    has_chat_template: bool


class ModelsBody(_Body):
    """All models."""

    object: Literal["list"]
    data: list[ModelBody]


class PromptUsage(_Body):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Usage(PromptUsage):
    """Tokens read and written."""

    completion_tokens: int


class CompletionLogprobs(_Body):
    """Natural logarithms of probabilities, by token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Body):
    """A text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class _Completion(_Body):
    id: str
    created: int
    model: str
    usage: Usage


class CompletionBody(_Completion):
    """Texts that continue prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Function(_Body):
    """A tool by its name, and its arguments, a JSON object as text."""

    name: str
    arguments: str


class ToolCall(_Body):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: Function


class ChatMessage(_Body):
    """A turn of the model; content is null only beside tool calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class TokenLogprob(_Body):
    """A token, and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A token of the text, and the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Body):
    """Probabilities of a text."""

    content: list[ChosenLogprob]
    refusal: None


class ChatChoice(_Body):
    """An answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatBody(_Completion):
    """Answers to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Embedding(_Body):
    """A vector, or its float32 bytes (little-endian) in base64."""

    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class EmbeddingsBody(_Body):
    """A vector for each input."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: PromptUsage


class TokensBody(_Body):
    """Tokens of a text."""

    tokens: list[int]
    count: int
    max_model_len: int


class TextBody(_Body):
    """Text of tokens."""

    prompt: str


_REASONS = {
    400: "the request cannot be answered",
    401: "the API key is missing or wrong",
    403: "the page's origin or the host is not let in",
    404: "there is no such model",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is compressed",
    429: "the server is full; Retry-After says when to come back",
    500: "the server failed",
    503: "the server is shutting down, or the model has stopped",
}
_Answers = dict[int | str, dict[str, Any]]
_ALWAYS = (400, 403, 415, 500)
_ASKED = (*_ALWAYS, 401, 503)
_READ = (*_ASKED, 404, 408, 413)


def open_answers(body: type[BaseModel]) -> _Answers:
    """Answers of a route that needs no key and tells a state."""
    return _errors(_ALWAYS) | {200: {"model": body}, 503: {"model": body, "description": "not now"}}


def answers(body: type[BaseModel] | None, *more: int) -> _Answers:
    """Answers of a route that reads no body.

    Args:
        body: of the answer; None: it is no JSON.
        more: statuses of errors beyond those that every route has.
    """
    found = _errors((*_ASKED, *more))
    if body:
        found[200] = {"model": body}
    return found


def answers_to_body(body: type[BaseModel], *more: int, streams: bool = False) -> _Answers:
    """Answers of a route that reads a body of JSON; see `answers`."""
    told: dict[str, Any] = {"model": body}
    if streams:
        data = {"type": "string", "description": "A chunk in JSON, an error in JSON, or [DONE]."}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        told["content"] = {"text/event-stream": {"schema": event}}
    return _errors((*_READ, *more)) | {200: told}


def _errors(statuses: tuple[int, ...]) -> _Answers:
    return {status: {"model": ErrorBody, "description": _REASONS[status]} for status in sorted(statuses)}


def document(app: FastAPI, has_keys: bool) -> dict[str, Any]:
    """The OpenAPI document of the routes."""
    told = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for operations in told["paths"].values():
        for operation in operations.values():
            # The framework's own status for bodies that are wrong; ours is 400.
            operation["responses"].pop("422", None)
            if has_keys and "401" in operation["responses"]:
                operation["security"] = [{"key": []}]
    told["components"]["schemas"].pop("HTTPValidationError", None)
    told["components"]["schemas"].pop("ValidationError", None)
    if has_keys:
        told["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return told
