"""The student's engine, made as the options say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from models.causal_lm import CausalLM
from models.transformers_sampler import TransformersSampler
from models.types import Sampler
from models.vllm.handover import Model
from models.vllm.in_process import EngineOptions, InProcessEngine
from models.vllm.preflight import ServerFacts
from models.vllm.sampler import VLLMSampler, Waits
from models.vllm.server import ServerEngine
from recipes.sampler_config import VLLMConfig
from recipes.student_config import StudentConfig

CPU_KV_CACHE_GIB = 1.0


def make_sampler(
    config: StudentConfig,
    student: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    servers: Sequence[ServerFacts],
    folder: Path | None,
) -> Sampler:
    """`folder`: of the run, which engines that keep a copy of the weights are handed them in."""
    options = config.sampler
    if not isinstance(options, VLLMConfig):
        return TransformersSampler(student, tokenizer, slots=config.sampler_slots)
    assert folder is not None, "engines with a copy of the weights belong to a run"
    model = Model(folder, tokenizer, dtype_name(student.compute_dtype))
    engines = (
        [ServerEngine(server.url, takes_adapters=server.takes_adapters) for server in servers]
        if options.url is not None
        else [InProcessEngine(engine_options(config, options, student.device, student.compute_dtype))]
    )
    return VLLMSampler(
        engines,
        model,
        temperature=config.comparison_temperature(),
        slots=config.sampler_slots,
        # An engine in this process that has died does not come back; a second, because it is also how often requests
        # that wait for a place look.
        waits=Waits(options.timeout_s, options.patience_s if options.url is not None else 1.0),
    )


def engine_options(
    config: StudentConfig, options: VLLMConfig, device: torch.device, dtype: torch.dtype
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
        lora_rank=config.lora_rank,
        sleeps=options.sleep and not on_cpu,
        seed=config.seed,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As options and vLLM have it."""
    return str(dtype).removeprefix("torch.")


def memory_lines(config: StudentConfig, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What the engine will hold."""
    options = config.sampler
    if not isinstance(options, VLLMConfig):
        return []
    if options.url is not None:
        return [f"vLLM: {len(options.urls())} server(s), with memory of their own"]
    engine = engine_options(config, options, device, dtype)
    if device.type == "cpu":
        return [f"vLLM: a copy of the student in {engine.dtype}, and {engine.kv_cache_gib:g} GiB for keys and values"]
    total = torch.cuda.get_device_properties(device).total_memory / 2**30 if torch.cuda.is_available() else None
    share = f"{engine.gpu_memory_utilization:.0%} of the device" + (
        f", {engine.gpu_memory_utilization * total:.1f} of {total:.1f} GiB" if total else ""
    )
    rest = "given back while the student trains" if engine.sleeps else "held while the student trains"
    return [f"vLLM: {share}, {rest}"]
