"""What a request may say: OpenAI's fields, checked. A field that would change the answer and cannot is refused."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, from_json

from ..artifacts import first_problem


# Of one request, as OpenAI's.
MAX_STOP_SEQUENCES = 4
# New tokens of `/v1/completions` where a request sets none, as OpenAI's.
DEFAULT_COMPLETION_TOKENS = 16
# Type of pydantic's errors whose message says all.
REFUSED = "refused"
Kind = TypeVar("Kind", bound="Request")


class ApiError(Exception):
    """
    A refusal, in the form in which OpenAI's clients read it.

    Args:
        status (`int`): HTTP status.
        message (`str`): what was sent, why it cannot work, what to send.
        code (`str`, *optional*): short name for programs.
        param (`str`, *optional*): the field of the request.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def only(*values: object) -> Any:
    """The type of a field that this server does not have: only values that change nothing are accepted."""

    def check(value: object) -> object:
        if value is not None and value not in values:
            raise PydanticCustomError(REFUSED, "this server does not support it. Leave it out.")
        return value

    return Annotated[Any, AfterValidator(check)]


def parts_of(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Checked):
    type: Literal["text"]
    text: str


class FunctionCall(Checked):
    name: str
    # A JSON object as a string.
    arguments: str

    def parsed(self) -> dict:
        try:
            # Unlike `json`, not half of a surrogate pair, which no tokenizer can read.
            arguments = from_json(self.arguments, allow_inf_nan=False)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            message = f"The arguments of a call of {self.name!r} are no JSON object. Send back those of the answer."
            raise ApiError(400, message, param="messages")
        return arguments


class ToolCall(Checked):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Checked):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Annotated[list[TextPart] | None, BeforeValidator(parts_of)] = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # What a client has of an answer, and may send back.
    name: only() = None
    refusal: only() = None
    audio: only() = None
    function_call: only() = None
    annotations: only([]) = None

    @model_validator(mode="after")
    def has_content(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError(REFUSED, "a message needs content. Set it to a string.")
        return self

    def for_template(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = "".join(part.text for part in self.content or [])
        if self.tool_calls:
            functions = [call.function for call in self.tool_calls]
            calls = [{"name": function.name, "arguments": function.parsed()} for function in functions]
            message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return message


class Function(Checked):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: only(False) = None


class Tool(Checked):
    type: Literal["function"]
    function: Function


class JsonSchema(Checked):
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    # The answer always follows the schema.
    strict: bool | None = None


class ResponseFormat(Checked):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(REFUSED, 'set type to "json_schema" and json_schema to the schema, or neither.')
        return self

    @property
    def allowed(self) -> dict[str, Any] | None:
        """The schema of what may be answered, `None` for any text."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(Checked):
    include_usage: bool = False
    include_obfuscation: only(False) = None


StopSequences = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOP_SEQUENCES)]


class Request(Checked):
    """Fields of both kinds of request."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[StopSequences | None, BeforeValidator(as_list)] = None
    n: only(1) = None
    presence_penalty: only(0) = None
    frequency_penalty: only(0) = None
    logit_bias: only({}) = None
    # What says who asks, and changes no answer.
    user: str | None = None

    @model_validator(mode="after")
    def has_a_stream(self) -> "Request":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(REFUSED, "stream_options need stream: true. Set it, or leave them out.")
        return self


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: only("auto", "none") = None
    parallel_tool_calls: only(True) = None
    logprobs: only(False) = None
    top_logprobs: only(0) = None
    modalities: only(["text"]) = None
    audio: only() = None
    prediction: only() = None
    functions: only() = None
    function_call: only() = None
    reasoning_effort: only() = None
    verbosity: only() = None
    web_search_options: only() = None
    service_tier: only("auto", "default") = None
    store: only(False) = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @model_validator(mode="after")
    def is_consistent(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(REFUSED, "max_tokens and max_completion_tokens are the same. Set one.")
        if self.uses_tools and self.response_format is not None and self.response_format.type != "text":
            message = 'tools and response_format exclude each other. Leave one out, or set tool_choice to "none".'
            raise PydanticCustomError(REFUSED, message)
        return self

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class CompletionRequest(Request):
    # One a request.
    prompt: Annotated[list[str], Field(min_length=1, max_length=1), BeforeValidator(as_list)]
    best_of: only(1) = None
    echo: only(False) = None
    logprobs: only() = None
    suffix: only("") = None

    @property
    def new_tokens(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


def parse(kind: type[Kind], body: bytes) -> Kind:
    """
    Raises:
        ApiError: with status 400, when the body is not JSON or not what `kind` says.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem, message = error.errors()[0], f"In the request, {first_problem(error)[:400]}."
    param = ".".join(map(str, problem["loc"]))[:80] or None
    if problem["type"] == "extra_forbidden":
        message = f"{param} is not a field that this server knows. Leave it out."
    elif problem["type"] == REFUSED:
        message = f"{param}: {problem['msg']}" if param else problem["msg"]
    raise ApiError(400, message, "invalid_json" if problem["type"] == "json_invalid" else None, param)
