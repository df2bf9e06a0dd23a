"""What samples, made as the options say: the student's engine, and what samples from a teacher."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import chz
import torch
from transformers import PreTrainedTokenizerBase

from errors import ConfigError
from models.causal_lm import CausalLM
from models.loading import load_config
from models.sources import ModelSource, context_length
from models.transformers_sampler import TransformersSampler
from models.types import Sampler
from models.vllm.handover import Model
from models.vllm.in_process import EngineOptions, InProcessEngine
from models.vllm.preflight import Asked, NewWeights, ServerFacts, check_servers, check_serving
from models.vllm.sampler import VLLMSampler, Waits
from models.vllm.server import ServerEngine
from models.weights import LMWeights
from recipes.sampler_config import SamplerConfig, VLLMConfig, servers_of
from recipes.student_config import StudentConfig
from recipes.teachers import CheckedTeacher, TeacherSpec

CPU_KV_CACHE_GIB = 1.0


def asked_servers(options: SamplerConfig, model: str | None = None) -> Asked | None:
    """The servers of the option `sampler.url`, if there are any. Raises `ConfigError`."""
    if not (urls := servers_of(options)):
        return None
    assert isinstance(options, VLLMConfig)
    return Asked(tuple(urls), options.token(), model, timeout_s=options.timeout_s, patience_s=options.patience_s)


def check_student_servers(
    config: StudentConfig, student: ModelSource, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[ServerFacts, ...]:
    """Raises `ConfigError` for a server that the student's weights cannot be handed to."""
    if (asked := asked_servers(config.sampler)) is None:
        return ()
    assert isinstance(config.sampler, VLLMConfig)
    weights = NewWeights(
        dtype_name(config.compute_dtype(device)),
        config.lora_rank,
        tied=bool(getattr(load_config(student).get_text_config(), "tie_word_embeddings", False)),
        transfer=config.sampler.transfer(),
    )

    async def check() -> list[ServerFacts]:
        return await check_servers(asked, tokenizer, weights, dry_run=config.dry_run)

    return tuple(anyio.run(check))


def check_teacher_servers(asked: Asked, tokenizer: PreTrainedTokenizerBase) -> tuple[ServerFacts, ...]:
    """Raises `ConfigError` for a server that nobody can sample from."""
    return tuple(anyio.run(check_serving, asked, tokenizer))


def check_sampled_teachers(
    config: StudentConfig, specs: Sequence[TeacherSpec], teachers: Mapping[str, CheckedTeacher]
) -> dict[str, Asked]:
    """Where to sample from the teachers that servers hold. Raises `ConfigError` for a server that only scores."""
    found = {}
    for spec in specs:
        if config.samples_teachers() and spec.server.url:
            access = spec.server.access(spec.server_option)
            asked = Asked(
                access.urls, access.token, spec.server.served_model, f"{spec.server_option}url",
                patience_s=access.patience_s,
            )  # fmt: skip
            try:
                check_teacher_servers(asked, teachers[spec.name].renderer.tokenizer)
            except ConfigError as error:
                raise ConfigError(f"{error}. Or leave eval_teacher out: it samples from teacher {spec.name}") from error
            found[spec.name] = asked
    return found


def make_sampler(
    config: StudentConfig,
    student: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    servers: Sequence[ServerFacts],
    folder: Path | None,
) -> Sampler:
    """`folder`: which engines that keep a copy of the weights are handed them in."""
    options = config.sampler
    if not isinstance(options, VLLMConfig):
        return TransformersSampler(student, tokenizer, slots=config.sampler_slots)
    assert folder is not None, "engines with a copy of the weights are handed them in a folder"
    if options.url is None:
        return _in_process(config, options, student, tokenizer, folder, lora_rank=config.lora_rank)
    how: Any = {"token": options.token(), "transfer": options.transfer()}
    return VLLMSampler(
        [ServerEngine(s.url, takes_adapters=s.takes_adapters, repacks=s.repacks, **how) for s in servers],
        Model(folder, tokenizer, dtype_name(student.compute_dtype)),
        temperature=config.comparison_temperature(),
        slots=config.sampler_slots,
        waits=Waits(options.timeout_s, options.patience_s),
    )


def make_teacher_sampler(
    config: StudentConfig, teacher: CausalLM, tokenizer: PreTrainedTokenizerBase, *, folder: Path
) -> Sampler:
    """Of a teacher that is loaded here. Servers of `config` are the student's: it is not for them."""
    options = config.sampler
    if isinstance(options, VLLMConfig) and options.url is None:
        return _in_process(config, options, teacher, tokenizer, folder, lora_rank=0)
    return TransformersSampler(teacher, tokenizer, slots=config.sampler_slots)


def make_serving_sampler(
    config: StudentConfig, asked: Asked, tokenizer: PreTrainedTokenizerBase, *, folder: Path
) -> Sampler:
    """Of a model that servers hold: their weights are used as they are."""
    return VLLMSampler(
        [ServerEngine(url, token=asked.token) for url in asked.urls],
        Model(folder, tokenizer, "bfloat16"),
        temperature=config.comparison_temperature(),
        slots=config.sampler_slots,
        waits=Waits(asked.timeout_s, asked.patience_s),
        served=asked.model,
    )


@asynccontextmanager
async def sampling(sampler: Sampler, lm: CausalLM | None) -> AsyncIterator[Sampler]:
    """The sampler, running, on the weights of `lm`; without one, on those that its servers have."""
    async with sampler:
        if lm is not None:
            await sampler.update_weights(LMWeights(lm), 0)
        yield sampler


def _in_process(
    config: StudentConfig,
    options: VLLMConfig,
    lm: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    lora_rank: int,
) -> VLLMSampler:
    given, own = options.max_model_len, context_length(lm.model.config)
    if given is not None and own is not None and given > own:  # of the models of a run, another has the longer context
        options = chz.replace(options, max_model_len=own)
    return VLLMSampler(
        [InProcessEngine(engine_options(config, options, lm.device, lm.compute_dtype, lora_rank=lora_rank))],
        Model(folder, tokenizer, dtype_name(lm.compute_dtype)),
        temperature=config.comparison_temperature(),
        slots=config.sampler_slots,
        # An engine in this process that has died does not come back; a second, because it is also how often requests
        # that wait for a place look.
        waits=Waits(options.timeout_s, patience_s=1.0),
    )


def engine_options(
    config: StudentConfig, options: VLLMConfig, device: torch.device, dtype: torch.dtype, *, lora_rank: int
) -> EngineOptions:
    on_cpu = device.type == "cpu"
    return EngineOptions(
        dtype=dtype_name(dtype),
        max_num_seqs=config.sampler_slots,
        max_model_len=options.max_model_len,
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_gib=CPU_KV_CACHE_GIB if options.kv_cache_gib is None and on_cpu else options.kv_cache_gib,
        enforce_eager=options.enforce_eager,
        tensor_parallel_size=options.tensor_parallel_size,
        lora_rank=lora_rank,
        transfer=options.transfer(),
        sleeps=options.sleep and not on_cpu,
        seed=config.seed,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As options and vLLM have it."""
    return str(dtype).removeprefix("torch.")


def engine_memory(
    config: StudentConfig, device: torch.device, dtype: torch.dtype, weights: float
) -> tuple[float, list[str]]:
    """What the engine will hold beside the models that are loaded here, in bytes and in words. `weights`: the student's
    size in `dtype`. Where vLLM takes a share of a device that is not at hand, the bytes are 0."""
    options = config.sampler
    if not isinstance(options, VLLMConfig):
        return 0, []
    if options.url is not None:
        return 0, [f"vLLM: {len(options.urls())} server(s), with memory of their own"]
    engine = engine_options(config, options, device, dtype, lora_rank=config.lora_rank)
    if device.type == "cpu":
        cache = engine.kv_cache_gib or CPU_KV_CACHE_GIB
        line = f"vLLM: a copy of the student in {engine.dtype}, {weights / 2**30:.2f} GiB, and {cache:g} GiB for keys"
        return weights + cache * 2**30, [f"{line} and values"]
    total = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 0
    size = engine.gpu_memory_utilization * total
    share = f"{engine.gpu_memory_utilization:.0%} of the device" + (
        f", {size / 2**30:.1f} of {total / 2**30:.1f} GiB" if total else ""
    )
    rest = "given back while the student trains" if engine.sleeps else "held while the student trains"
    return (0 if engine.sleeps else size), [f"vLLM: {share}, {rest}"]
