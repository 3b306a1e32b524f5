"""The application: routes of OpenAI's API, and what turns requests into jobs for an engine.

app = create_app({"stories": onebit.load()})
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from onebit.engine.engine import check_tokens
from onebit.engine.sampling import SamplingParams
from onebit.engine.tokenizer import Tokenizer
from onebit.serve.answer import Answer
from onebit.serve.bodies import (
    ChatBody,
    CompletionBody,
    EmbeddingsBody,
    ModelBody,
    ModelsBody,
    StateBody,
    TextBody,
    TokensBody,
    answers,
    answers_to_body,
    document,
    open_answers,
)
from onebit.serve.forms import ChatForm, CompletionForm, Form, TokenBytes
from onebit.serve.gate import Gate, Log
from onebit.serve.grammar import Grammar
from onebit.serve.page import Page
from onebit.serve.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Message,
    Sampling,
    TokenizeRequest,
    error_body,
)
from onebit.serve.runner import Job
from onebit.serve.service import Options, Place, Service

if TYPE_CHECKING:
    from onebit.llm import LLM

router = APIRouter()


def create_app(
    models: Mapping[str, "LLM"], options: Options | None = None, log_file: Path | None = None
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        models: by the names that requests call them by; the first answers requests that name none.
        options: limits and keys.
        log_file: gets a line of JSON for each request; None: stderr.

    Raises:
        ValueError: see `Service`.
        OSError: the log file cannot be written.
    """
    service = Service(models, options or Options())
    log = Log(log_file, service.metrics.lost_log_lines.inc)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start())
        try:
            yield
        finally:
            starting.cancel()
            service.close()
            log.close()

    # Without the pages that show the API: they load scripts of others.
    # Redirects would name the host that the request made up.
    app = FastAPI(title="onebit", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.openapi = cache(partial(document, app, bool(service.options.api_keys)))  # type: ignore[method-assign]
    app.state.service = service
    app.state.page = page = Page()
    app.include_router(router)
    app.mount("/static", page)
    app.add_exception_handler(HTTPException, _tell)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_middleware(Gate, service=service, log=log)
    if origins := list(service.options.allow_origins):
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


@router.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    """The page: a chat and a dashboard."""
    page: Page = request.app.state.page
    return await page.get_response("index.html", request.scope)


@router.get("/v1/models", responses=answers(ModelsBody), response_model=None)
async def models(request: Request) -> dict[str, Any]:
    """The models of this server, and their adapters."""
    return {"object": "list", "data": [_model(place) for place in _service(request).all_places()]}


@router.get("/v1/models/{model:path}", responses=answers(ModelBody, 404), response_model=None)
async def model(model: str, request: Request) -> dict[str, Any]:
    """One model."""
    return _model(_service(request).find(model))


@router.post("/v1/completions", responses=answers_to_body(CompletionBody, 429, streams=True))
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue texts."""
    service = _service(request)
    place = service.find(body.model)
    prompts = body.prompts
    if place.served.llm.checkpoint.tokenizer is None and any(isinstance(p, str) for p in prompts):
        raise ApiError(400, "this model has no tokenizer; give token ids instead of texts", param="prompt")

    async def prepare() -> tuple[Sequence[Job], Form]:
        size = sum(len(prompt) for prompt in prompts)
        tokens = await service.work(lambda: [_encode(place, prompt, "prompt") for prompt in prompts], size)
        asked = body.params
        if body.logprobs is not None:
            asked["logprobs"] = body.logprobs
            if body.echo:
                asked["prompt_logprobs"] = body.logprobs
        grammar = await _grammar(service, place, body)
        jobs = _jobs(place, tokens, body, asked, body.max_tokens, grammar)
        texts = [p if isinstance(p, str) else _decode(place, p) for p in prompts] if body.echo else []
        config = place.served.llm.config
        silent = {config.bos_token, *config.eos_tokens} - {None}
        names = await _token_bytes(service, place, body.logprobs is not None)
        return jobs, CompletionForm(place.name, body, tokens, texts, names, frozenset(silent))  # type: ignore[arg-type]

    return Answer(place, body, len(prompts) * (body.n or 1), prepare)


@router.post("/v1/chat/completions", responses=answers_to_body(ChatBody, 429, streams=True))
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = _service(request)
    place = service.find(body.model)

    async def prepare() -> tuple[Sequence[Job], Form]:
        size = sum(len(message.content or "") for message in body.messages)
        tokens = await service.work(lambda: _encode_chat(place, body.messages, body.offered_tools), size)
        asked = body.params
        if body.logprobs:
            asked["logprobs"] = body.top_logprobs or 0
        grammar = await _grammar(service, place, body)
        most = body.max_completion_tokens or body.max_tokens
        jobs = _jobs(place, [tokens], body, asked, most, grammar)
        return jobs, ChatForm(place.name, body, await _token_bytes(service, place, bool(body.logprobs)))

    return Answer(place, body, body.n or 1, prepare)


@router.post("/v1/embeddings", responses=answers_to_body(EmbeddingsBody, 429), response_model=None)
async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
    """Turn texts into vectors: the mean of the hidden states of their tokens."""
    service = _service(request)
    place = service.find(body.model)
    llm, runner = place.served.llm, place.served.runner
    inputs = body.inputs
    record = request.scope["state"]["record"]
    record.model, record.choices = place.name, len(inputs)
    if body.dimensions not in (None, llm.config.d_model):
        raise ApiError(
            400, f"dimensions is {body.dimensions}; this model gives {llm.config.d_model}", param="dimensions"
        )
    with runner.reserve(len(inputs)):
        size = sum(len(given) for given in inputs)
        tokens = await service.work(lambda: [_encode(place, given, "input") for given in inputs], size)
        # One by one: between two of them running streams take their steps.
        vectors = [await runner.call(partial(llm.embed, one, place.adapter)) for one in tokens]
    record.prompt_tokens = sum(map(len, tokens))
    data = []
    for index, vector in enumerate(vectors):
        raw = np.asarray(vector, "<f4")
        told: Any = raw.tolist()
        if body.encoding_format == "base64":
            told = base64.b64encode(raw.tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": told})
    usage = {"prompt_tokens": record.prompt_tokens, "total_tokens": record.prompt_tokens}
    return {"object": "list", "data": data, "model": place.name, "usage": usage}


@router.post("/tokenize", responses=answers_to_body(TokensBody), response_model=None)
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """The tokens of a text or a conversation."""
    service = _service(request)
    place = service.find(body.model)
    tokenizer = _tokenizer(place)

    def encode() -> list[int]:
        try:
            if body.messages is not None:
                return _encode_chat(place, body.messages, body.tools)
            _check_size(place, body.prompt or "", "prompt")
            prompt = tokenizer.prepare(body.prompt or "")
            return tokenizer.encode(prompt, begin=body.add_special_tokens)
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    tokens = await service.work(encode)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": place.served.context}


@router.post("/detokenize", responses=answers_to_body(TextBody), response_model=None)
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """The text of tokens."""
    service = _service(request)
    tokenizer = _tokenizer(service.find(body.model))
    return {"prompt": await service.work(lambda: tokenizer.decode(body.tokens))}


@router.get("/health", responses=open_answers(StateBody))
async def health(request: Request) -> Response:
    """Whether the server works: every engine's thread is alive."""
    is_alive = all(s.runner.is_alive for s in _service(request).served)
    return JSONResponse({"status": "ok" if is_alive else "stopped"}, 200 if is_alive else 503)


@router.get("/ready", responses=open_answers(StateBody))
async def ready(request: Request) -> Response:
    """Whether the server takes requests: warmed up, and not shutting down."""
    state = _service(request).state
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/metrics", responses=answers(None), response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(_service(request).metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _model(place: Place) -> dict[str, Any]:
    served = place.served
    return {
        "id": place.name,
        "object": "model",
        "created": served.created,
        "owned_by": "onebit",
        "parent": served.name if place.adapter else None,
        "max_model_len": served.context,
        "label": served.llm.label,
        "has_chat_template": served.llm.checkpoint.chat_template is not None,
    }


def _tokenizer(place: Place) -> Tokenizer:
    try:
        return place.served.llm.tokenizer
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def _encode(place: Place, prompt: str | list[int], param: str) -> list[int]:
    """Token ids that the model can read."""
    llm, context = place.served.llm, place.served.context
    if isinstance(prompt, str):
        _check_size(place, prompt, param)
    try:
        tokens = llm.encode(prompt)
        if len(tokens) <= context:
            check_tokens(llm.config, tokens)
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from None
    _check_length(tokens, context, param)
    return tokens


def _check_size(place: Place, text: str, param: str) -> None:
    """Refuse a text that has too many tokens however it is cut, before anybody counts them."""
    context = place.served.context
    most = context * _tokenizer(place).longest_token
    if len(text) > most:
        raise ApiError(
            400,
            f"{param} has {len(text):,} characters; the context of this model has {context} tokens, which hold "
            f"{most:,} at the most: shorten it",
            "context_length_exceeded",
            param,
        )


def _check_length(tokens: list[int], context: int, param: str) -> None:
    if len(tokens) > context:
        raise ApiError(
            400,
            f"{param} has {len(tokens)} tokens; the context of this model has {context}: shorten it",
            "context_length_exceeded",
            param,
        )


def _encode_chat(
    place: Place, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> list[int]:
    tokenizer = _tokenizer(place)
    if tokenizer.chat_template is None:
        raise ApiError(
            400,
            f"model {place.name} has no chat template; use /v1/completions with a prompt",
            "no_chat_template",
        )
    try:
        text = tokenizer.render_chat([message.for_template for message in messages], tools=tools)
        _check_size(place, text, "messages")
        tokens = tokenizer.encode(text, begin=False)
    except ValueError as error:
        raise ApiError(400, str(error)[:500], param="messages") from None
    _check_length(tokens, place.served.context, "messages")
    return tokens


def _decode(place: Place, tokens: list[int]) -> str:
    return _tokenizer(place).decode(tokens)


async def _grammar(service: Service, place: Place, body: Sampling) -> Grammar | None:
    schema = body.schema_text if isinstance(body, ChatRequest) else None
    served, text = place.served, body.grammar
    if schema is not None:
        return await service.compile(lambda: served.vocabulary.from_schema(schema), "response_format")
    if text is not None:
        return await service.compile(lambda: served.vocabulary.from_text(text), "grammar")
    return None


async def _token_bytes(service: Service, place: Place, is_needed: bool) -> TokenBytes:
    served = place.served
    if not is_needed or served.llm.checkpoint.tokenizer is None:
        return lambda token: f"token_id:{token}".encode()
    vocabulary = await service.work(lambda: served.vocabulary)
    return vocabulary.token_bytes


def _jobs(
    place: Place,
    prompts: Sequence[list[int]],
    body: Sampling,
    asked: dict[str, Any],
    max_tokens: int | None,
    grammar: Grammar | None,
) -> list[Job]:
    """What the engine is asked for: n texts of each prompt, side by side."""
    jobs: list[Job] = []
    try:
        plain = SamplingParams(**asked)
        for tokens in prompts:
            room = place.served.context - len(tokens) + 1
            # An echo alone takes a token too.
            most = max(room if max_tokens is None else min(max_tokens, room), 1)
            for choice in range(body.n or 1):
                own: dict[str, Any] = {"max_tokens": most, "seed": body.seed_of(choice)}
                if grammar is not None:
                    own["grammar"] = grammar.copy()
                jobs.append((tokens, replace(plain, **own), place.adapter_index))
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    return jobs


async def _tell(request: Request, error: Exception) -> Response:
    """Errors of HTTP in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return JSONResponse(error.body, error.status_code, error.headers)
    path = ascii(request.url.path[:100])
    messages = {
        404: f"there is nothing at {path}; the API is under /v1",
        405: f"{path} does not take {request.method}",
        400: "the body is not JSON in UTF-8",
    }
    message = messages.get(error.status_code, str(error.detail))
    return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)


async def _tell_invalid(request: Request, error: Exception) -> Response:
    """What is wrong with a body, by field; never more of it than a few words."""
    assert isinstance(error, RequestValidationError)
    problems: dict[str, list[str]] = {}
    for problem in error.errors():
        place = [str(part) for part in problem["loc"][1:]]
        # A field that may be one of several things fails as each of them: one line for it.
        field = place[0] if place and problem["type"] != "json_invalid" else ""
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "json_invalid":
            message = f"the body is not JSON: {problem['ctx']['error']}"
        elif problem["type"] == "extra_forbidden":
            message = "this server does not know this field"
        elif problem["loc"] == ("body",):
            message = _body_problem(request, message)
        problems.setdefault(field, [])
        if message not in problems[field]:
            problems[field].append(message)
    field, messages = next(iter(problems.items()))
    text = (f"{field[:100]}: " if field else "") + "; or ".join(messages[:4])
    return JSONResponse(error_body(400, text, "invalid_value", field[:100] or None), 400)


def _body_problem(request: Request, message: str) -> str:
    kind = request.headers.get("content-type", "none")[:100]
    if "json" not in kind:
        return f"the content type is {ascii(kind)}; send application/json"
    return message
