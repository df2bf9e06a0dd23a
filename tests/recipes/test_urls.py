"""Addresses of servers: what is taken, and that everything else is refused with the option's name."""

from __future__ import annotations

import pytest

from errors import ConfigError
from recipes import evaluate, on_policy_distillation, on_policy_multi_teacher
from recipes.cli import parse_config
from recipes.urls import check_url


@pytest.mark.parametrize("url", ["http://h", "https://h:1/", "http://[::1]:8000", "http://127.0.0.1:1", "http://a.b."])
def test_an_address_is_taken(url: str):
    check_url(url)


BAD = [
    "http://h:99999", "http://h:abc", "http://h:-1", "http://h:0", "http://[::1", "http://h#x", "http://h?x", "h:1",
    "ftp://h", "http://:80", "http://a b", "http://a..b", f"http://{'a' * 64}:1",
]  # fmt: skip


@pytest.mark.parametrize("option", ["teacher.url", "sampler.url"])
@pytest.mark.parametrize("url", BAD)
def test_what_is_no_address_is_refused_with_the_options_name(option: str, url: str):
    with pytest.raises(ConfigError) as error:
        parse_config(on_policy_distillation.Config, [f"{option}={url}"], presets=on_policy_distillation.presets)
    assert str(error.value) == f"{option}={url}: expected an address like http://host:8000"


@pytest.mark.parametrize("url", ["http://me:secret@h", "http://me:secret@[::1"])
def test_a_password_is_not_shown(url: str):
    with pytest.raises(ConfigError, match=r"^sampler.url holds a user or a password.*sampler.token_file$") as error:
        check_url(url, prefix="sampler.")
    assert "secret" not in str(error.value)


def test_a_variable_that_is_not_set_is_no_teacher_in_this_process():
    for given in (["teacher.url="], ["teacher.url=", "teacher_model=embedded:teacher"], ["teacher.url=http://h,"]):
        with pytest.raises(ConfigError, match=r"^teacher.url is empty"):
            parse_config(on_policy_distillation.Config, given, presets=on_policy_distillation.presets)
    with pytest.raises(ConfigError, match=r"^teacher.url is empty"):
        parse_config(evaluate.Config, ["model_name=embedded:student", "teacher.url="])


def test_of_several_teachers_the_one_is_named():
    rows = ["model_name=m", "datasets.0.dataset=gsm8k", "datasets.1.dataset=gsm8k"]
    given = [*rows, "datasets.0.teacher.url=http://a", "datasets.1.teacher.url=ftp://b"]
    with pytest.raises(ConfigError, match=r"^datasets.1.teacher.url=ftp://b: expected"):
        parse_config(on_policy_multi_teacher.Config, given)


def test_an_option_of_a_server_alone_is_named_whole():
    with pytest.raises(ConfigError, match=r"^teacher.token_env is of a teacher on a server"):
        parse_config(on_policy_distillation.Config, ["model_name=m", "teacher_model=m", "teacher.token_env=X"])
