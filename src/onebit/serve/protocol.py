"""What requests may say, and how errors are told: the API of OpenAI, strict and bounded.

Knows nothing of models. A field that is not here is refused by name; what is here and `Ignored` changes no text.

    CompletionRequest.model_validate({"model": "stories", "prompt": "Once upon a time"})
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from onebit.serve.tools import with_parsed_arguments

MAX_CHOICES = 16
MAX_PROMPTS = 256
MAX_LOGPROBS = 20
MAX_GRAMMAR_CHARS = 65536

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = list[Token]
TokenKey = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class ApiError(HTTPException):
    """An error as OpenAI tells it.

    Args:
        status: of HTTP.
        message: what was wrong, what was expected and what to do.
        code: a word for programs, or None.
        param: the field that is wrong, or None.
        retry_after_s: seconds after which to try again, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        return error_body(self.status_code, self.detail, self.code, self.param)


def error_body(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape; its type follows from the status."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    told = {"message": message, "type": kind, "param": param, "code": code}
    # What users make up may hold halves of surrogate pairs, which are no UTF-8.
    safe = {name: text and text.encode("utf-8", "backslashreplace").decode() for name, text in told.items()}
    return {"error": safe}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream has besides text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Ignored(_Strict):
    """Fields of OpenAI's that are about accounts, storage and bills; accepted, without effect."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    model: str | None = Field(None, max_length=500)


class Sampling(_Ignored):
    """How tokens are chosen, and how often; see `onebit.SamplingParams`."""

    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    min_sigma: float | None = Field(None, ge=0, le=100)
    repetition_penalty: float | None = Field(None, ge=1e-6, le=1e6)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[TokenKey, Bias] | None = Field(None, max_length=300)
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    grammar: str | None = Field(None, min_length=1, max_length=MAX_GRAMMAR_CHARS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def params(self) -> dict[str, Any]:
        """Fields of SamplingParams, as far as the request says them.

        A request that says how to draw gets that and nothing else: filters that it leaves out are off. One that says
        nothing of it draws as `onebit run` does.
        """
        draws = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "min_sigma": 0.0}
        said = {name: getattr(self, name) for name in draws if getattr(self, name) is not None}
        params: dict[str, Any] = draws | said if said else {}
        if params.get("top_k") == -1:
            params["top_k"] = 0
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos", "stop"):
            if (value := getattr(self, name)) is not None:
                params[name] = value
        if self.logit_bias:
            params["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return params

    def seed_of(self, choice: int) -> int | None:
        """The seed of one of n choices: the request's, counted up."""
        return None if self.seed is None else (self.seed + choice) % 2**64

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Sampling):
    """Continue texts."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(max_length=MAX_PROMPTS)]
        | Annotated[list[Tokens], Field(max_length=MAX_PROMPTS)]
    )
    # 0 is for programs that want the echo alone.
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = 16
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _refuse(self) -> "CompletionRequest":
        if self.suffix:
            raise ValueError("suffix is not supported: these models write forwards only; leave it out")
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported beyond n; leave it out, or take n and choose yourself")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts of a list, or the one there is."""
        prompt: Any = self.prompt
        is_list = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        return prompt if is_list else [prompt]


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None


class Message(BaseModel):
    """A turn of a conversation. Fields beyond these come back from clients that repeat answers; they are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @property
    def for_template(self) -> dict[str, Any]:
        """The turn as chat templates know it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text or part.refusal or "" for part in content)
        turn = {"role": "system" if self.role == "developer" else self.role, "content": content or ""}
        rest = {name: getattr(self, name) for name in ("name", "tool_calls", "tool_call_id")}
        if self.tool_calls is not None:
            rest["tool_calls"] = [with_parsed_arguments(call) for call in self.tool_calls]
        return turn | {name: value for name, value in rest.items() if value is not None}


class JsonSchema(_Strict):
    """A schema with its name."""

    # "schema" is a method of pydantic's models.
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("a response_format of type json_schema needs json_schema.schema")
        return self


class ChatRequest(Sampling):
    """Answer a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.grammar and self.schema_text is not None:
            raise ValueError("grammar and response_format exclude each other; give one of them")
        return self

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of."""
        return None if self.tool_choice == "none" else self.tools

    @property
    def schema_text(self) -> dict[str, Any] | None:
        """The JSON schema that the answer has to fit, or None."""
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None
        return asked.json_schema.schema_ if asked.json_schema else {"type": "object"}


class EmbeddingRequest(_Ignored):
    """Turn texts into vectors."""

    input: (
        str
        | Tokens
        | Annotated[list[str], Field(max_length=MAX_PROMPTS)]
        | Annotated[list[Tokens], Field(max_length=MAX_PROMPTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs of a list, or the one there is."""
        given: Any = self.input
        is_list = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
        return given if is_list else [given]


class TokenizeRequest(_Strict):
    """Count the tokens of a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=128)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt, a text, or messages, a conversation")
        return self


class DetokenizeRequest(_Strict):
    """Turn tokens into text."""

    model: str | None = None
    tokens: Tokens
