"""Serve teachers to runs on other machines: their scores, or what makes their whole distributions, over HTTP.

    python -m recipes.serve_teacher model_name=Qwen/Qwen2.5-7B-Instruct
    python -m recipes.serve_teacher models.0.model_name=./mathematician models.1.model_name=./talker \\
        host=0.0.0.0 token_file=./token

A run names the service's address as its teacher's URL. Several runs may share a service, at any
temperatures; a model is loaded when somebody first needs it. Ctrl-C or SIGTERM ends it.
"""

from __future__ import annotations

import logging
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import anyio
import chz
import torch

from envs.rendering import tokenizer_fingerprint
from errors import ConfigError, ModelError
from models import attention
from models.adapters import check_base
from models.causal_lm import CausalLM
from models.checks import default_device, default_dtype
from models.cpu_matmul import use_fast_exact_matmul
from models.loading import load_config, load_model, load_tokenizer
from models.sources import ModelSource, context_length
from models.teacher_service.hosting import Checkpoint, ServedModel
from models.teacher_service.messages import ModelInfo
from models.teacher_service.server import Service, ServiceLimits
from models.teacher_service.serving import listen, make_server
from models.teacher_service.token import TOKEN_VARIABLE, read_token
from recipes import embedded
from recipes.cli import run_cli
from recipes.student_config import check_at_least
from recipes.teachers import weights_fingerprint

LIMITS = ServiceLimits()


@chz.chz
class ModelOptions:
    """One model of several."""

    model_name: str = chz.field(doc="hub id, local folder or .gguf file")
    checkpoint: str | None = chz.field(default=None, doc="its weights: HF folder or adapter")
    name: str | None = chz.field(default=None, doc="what runs call it; default: the last part of its name")


@chz.chz
class Config:
    """A service of one teacher, or of several with `models`."""

    model_name: str | None = chz.field(default=None, doc="the teacher: hub id, local folder or .gguf file")
    checkpoint: str | None = chz.field(default=None, doc="its weights: HF folder or adapter")
    name: str | None = chz.field(default=None, doc="what runs call it; default: the last part of its name")
    models: tuple[ModelOptions, ...] = chz.field(default=(), doc="several teachers, in place of model_name")

    host: str = chz.field(default="127.0.0.1", doc="address to listen on; any but loopback needs a token")
    port: int = chz.field(default=8765, doc="0 takes a free one")
    token_file: str | None = chz.field(
        default=None, doc=f"file that holds the token which clients must send; default: ${TOKEN_VARIABLE}, if it is set"
    )

    device: str = chz.field(default="auto", doc="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = chz.field(
        default="auto", doc="of weights and computation; auto: bfloat16 on GPUs that have it, else float32"
    )
    attn_implementation: str = chz.field(
        default="auto", doc="auto: packed without padding; else transformers' own (sdpa, eager, …), padded"
    )
    score_tokens: int | None = chz.field(
        default=None, doc="tokens of one forward pass; default 512 on a CPU, 32768 on CUDA"
    )
    max_top_k: int = chz.field(default=LIMITS.top_k, doc="largest top_k that is given")
    max_request_tokens: int = chz.field(
        default=LIMITS.request_tokens, doc="of one request; a model's context length, if that is more"
    )
    max_waiting_requests: int = chz.field(
        default=LIMITS.waiting_requests, doc="more are told to come back later (status 503)"
    )
    max_waiting_tokens: int = chz.field(default=LIMITS.waiting_tokens, doc="of all requests that wait, likewise")
    grace_s: float = chz.field(
        default=20.0,
        doc="after SIGTERM or Ctrl-C, how long what is being scored may take; a second one ends it at once",
    )

    @chz.validate
    def _check(self) -> None:
        attention.implementation(self.attn_implementation)
        check_at_least(
            self,
            {"port": 0, "max_top_k": 1, "max_request_tokens": 1, "max_waiting_requests": 1, "max_waiting_tokens": 1},
        )
        if self.score_tokens is not None and self.score_tokens < 1:
            raise ConfigError(f"score_tokens={self.score_tokens}: expected 1 or more")
        if self.port > 65_535:  # the system's lookup would take what is left of it after 16 bits
            raise ConfigError(f"port={self.port}: expected at most 65535")
        if not 0 <= self.grace_s < float("inf"):
            raise ConfigError(f"grace_s={self.grace_s}: expected 0 or more")
        if bool(self.models) == (self.model_name is not None):
            raise ConfigError("give model_name, or models.0.model_name, models.1.model_name, …: one way or the other")
        if self.models and (self.checkpoint, self.name) != (None, None):
            raise ConfigError("checkpoint and name go with model_name: use models.0.checkpoint and models.0.name")
        names = [name_of(options) for options in self.all_models()]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ConfigError(f"two models are called {name!r}: give one another with models.{i}.name")

    def all_models(self) -> Sequence[ModelOptions]:
        if self.model_name is None:
            return self.models
        return (ModelOptions(model_name=self.model_name, checkpoint=self.checkpoint, name=self.name),)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        return default_dtype(self.dtype, device)

    def limits(self) -> ServiceLimits:
        return ServiceLimits(
            request_tokens=self.max_request_tokens,
            top_k=self.max_top_k,
            waiting_requests=self.max_waiting_requests,
            waiting_tokens=self.max_waiting_tokens,
        )


def name_of(options: ModelOptions) -> str:
    """Raises `ConfigError` for a name that does not go into a URL."""
    name = options.name or re.sub(r"\.gguf$", "", options.model_name.rstrip("/").rpartition("/")[2])
    name = name if options.name else name.replace(embedded.PREFIX, "")
    if not re.fullmatch(r"[A-Za-z0-9][\w.:+-]{0,99}", name, re.ASCII):
        raise ConfigError(f"{name!r} is no name for a model here: letters, digits and ._:+- only. Give name=")
    return name


def main(config: Config) -> int:
    """Returns the exit code: 0 after SIGTERM, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    token = read_token(config.token_file)
    socket_ = listen(config.host, config.port, token=token)
    with socket_:
        models = served_models(config)
        server = make_server(Service(models, token=token, limits=config.limits()))
        for model in models:
            print(
                f"{model.info.name}: {model.info.dtype}, context {model.info.context_length}, loaded when first needed"
            )
        server.end_at_signals(config.grace_s)
        print(f"serving on {address(socket_)}, {'with a token' if token else 'without a token'}", flush=True)
        anyio.run(lambda: server.serve(sockets=[socket_]))
    return server.exit_code


def address(socket_: socket.socket) -> str:
    host, port = socket_.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def served_models(config: Config) -> list[ServedModel]:
    """Everything that is known without weights. Models of the same weights share them. Raises `UserError`s."""
    device = default_device(config.device)
    checkpoints: dict[str, Checkpoint] = {}
    made = []
    for options in config.all_models():
        source = ModelSource(embedded.resolve(options.model_name), options.checkpoint)
        check_base(source)
        model_config = load_config(source)
        text = model_config.get_text_config()
        weights = weights_fingerprint(source)
        if weights not in checkpoints:
            checkpoints[weights] = _checkpoint(config, source, weights, device)
        info = ModelInfo(
            name=name_of(options),
            weights=weights,
            tokenizer=tokenizer_fingerprint(load_tokenizer(source)),
            vocab_size=text.vocab_size,
            context_length=context_length(model_config),
            hidden_size=text.hidden_size,
            dtype=str(config.compute_dtype(device)).removeprefix("torch."),
            source=None if Path(source.name).expanduser().exists() else source.name,
        )
        made.append(ServedModel(info, checkpoints[weights]))
    return made


def _checkpoint(config: Config, source: ModelSource, weights: str, device: torch.device) -> Checkpoint:
    dtype = config.compute_dtype(device)

    def load() -> CausalLM:
        if weights_fingerprint(source) != weights:
            raise ModelError(f"{source.name}: its files have changed since the service was started; start it again")
        use_fast_exact_matmul()
        implementation = attention.implementation(config.attn_implementation)
        model = load_model(source, dtype=dtype, device=device, attn_implementation=implementation)
        model.requires_grad_(False)
        return CausalLM.verified(model, compute_dtype=dtype)

    return Checkpoint(load, token_budget=config.score_tokens or (32_768 if device.type == "cuda" else 512))


if __name__ == "__main__":
    run_cli(main, Config, argv=sys.argv[1:])
