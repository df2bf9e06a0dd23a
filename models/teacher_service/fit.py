"""Whether a service's model can be the teacher of a run, from what it says of itself."""

from __future__ import annotations

from errors import ConfigError, TokenizerMismatchError
from models.teacher_service.messages import ModelInfo, ServiceInfo
from models.types import SignalKind, SignalSpec, TeacherTopK


def find_model(service: ServiceInfo, name: str | None, url: str) -> ModelInfo:
    """The model of that name, or the only one there is. Raises `ConfigError`."""
    if name is None and len(service.models) == 1:
        return service.models[0]
    for model in service.models:
        if model.name == name:
            return model
    there = ", ".join(model.name for model in service.models)
    raise ConfigError(f"{url} serves {there}" + (f", not {name}" if name else ": say which"))


def check_fit(
    service: ServiceInfo,
    model: ModelInfo,
    *,
    url: str,
    tokenizer: str,
    tokenizer_name: str,
    need: SignalSpec,
    temperature: float,
) -> None:
    """Raises `ConfigError` for what the service does not give, and `TokenizerMismatchError`.

    `tokenizer` is the fingerprint of the tokenizer that makes the teacher's views here, `tokenizer_name` where it is
    from. Whether the student's ids mean the same to it is `check_pair`'s to say."""
    if tokenizer != model.tokenizer:
        raise TokenizerMismatchError(
            f"the teacher's tokenizer here ({tokenizer_name}) is not the one that {model.name} at {url} reads with: "
            "give the tokenizer of the model that is served"
        )
    limits = service.limits
    if isinstance(need, TeacherTopK) and min(need.k, model.vocab_size) > limits.top_k:
        raise ConfigError(
            f"top_k={need.k}: {url} gives at most {limits.top_k}. Lower it, or start the service with "
            f"max_top_k={need.k}"
        )
    if (size := _largest_row(model, need)) > limits.answer_bytes:
        raise ConfigError(
            f"{url} gives at most {limits.answer_bytes} bytes at a time, and one position needs {size}"
            + (f": lower top_k={need.k}" if isinstance(need, TeacherTopK) else ": use an objective that needs less")
        )
    low, high = limits.temperature
    if not low <= temperature <= high:
        raise ConfigError(f"temperature={temperature}: {url} scores at {low} to {high}")


def _largest_row(model: ModelInfo, need: SignalSpec) -> int:
    """Bytes of what is never cut: the answer to one position, or a row of the head."""
    if isinstance(need, TeacherTopK):
        return 4 + 8 * min(need.k, model.vocab_size)
    return 4 * (model.hidden_size + 1) if need is SignalKind.FULL else 4
