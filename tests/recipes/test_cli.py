"""The command line: layers, and for every mistake one message and the right exit code."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import chz
import chz.validators
import pytest

from errors import CheckpointError, ConfigError
from recipes.cli import help_text, parse_config, run_cli


@chz.chz
class Optimizer:
    learning_rate: float = chz.field(default=1e-3, doc="step size of AdamW", validator=chz.validators.gt(0))
    betas: tuple[float, ...] = chz.field(default=(0.9, 0.95), doc="decay of the moments")


@chz.chz
class Config:
    """Trains something."""

    log_path: str = chz.field(doc="folder of the run")
    dataset: str = chz.field(default="arithmetic", doc="what to train on")
    learning_rate: float = chz.field(default=1e-4, doc="peak learning rate")
    group_size: int = chz.field(default=4, doc="episodes per prompt")
    loss_fn: Literal["ppo", "cispo"] = chz.field(default="ppo", doc="policy loss")
    model_name: str | None = chz.field(default=None, doc="a hub id or folder")
    optimizer: Optimizer = chz.field(default_factory=lambda: Optimizer(learning_rate=0.5), doc="how weights move")

    @chz.validate
    def _check(self) -> None:
        if self.group_size > 64:
            raise ConfigError(f"group_size={self.group_size}: expected at most 64")


def presets(given: dict[str, str]) -> dict[str, object]:
    if given.get("dataset") == "deepmath":
        return {"learning_rate": 7e-4, "group_size": 8, "optimizer.betas": (0.8, 0.9)}
    if given.get("dataset", "arithmetic") != "arithmetic":
        raise ConfigError(f"dataset={given['dataset']}: expected arithmetic or deepmath")
    return {}


def run(capfd, *argv: str, main=lambda config: None) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        run_cli(main, Config, presets=presets, argv=argv)
    out, err = capfd.readouterr()
    assert isinstance(exit.value.code, int)
    return exit.value.code, out, err


def test_a_given_value_beats_the_preset_which_beats_the_default():
    config = parse_config(Config, ["log_path=x", "dataset=deepmath", "group_size=2"], presets=presets)
    assert (config.learning_rate, config.group_size, config.loss_fn) == (7e-4, 2, "ppo")
    assert config.optimizer.betas == (0.8, 0.9)
    assert parse_config(Config, ["log_path=x"], presets=presets).learning_rate == 1e-4


def test_values_may_hold_equals_signs_and_the_last_of_equal_keys_wins():
    config = parse_config(Config, ["log_path=a=b", "group_size=2", "group_size=3", "model_name=None"])
    assert (config.log_path, config.group_size, config.model_name) == ("a=b", 3, None)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["learning_rat=1"], ["unknown option learning_rat", "Did you mean learning_rate?"]),
        (["betas=1"], ["unknown option betas", "Did you mean optimizer.betas?"]),
        (["optimiser.betas=1"], ["Did you mean optimizer.betas?"]),
        (["optimizer.beta=1"], ["Did you mean optimizer.betas?"]),
        (["zzzzzz=1"], ["unknown option zzzzzz", "--help"]),
        (["learning_rate=fast"], ["learning_rate=fast", "expected float"]),
        (["group_size=1.5"], ["group_size=1.5", "expected int"]),
        (["optimizer.learning_rate=fast"], ["optimizer.learning_rate=fast", "expected float"]),
        (["loss_fn=pop"], ["loss_fn=pop", "expected one of ppo, cispo"]),
        (["optimizer.learning_rate=-1"], ["Expected learning_rate to be greater than 0, got -1"]),
        (["group_size=65"], ["group_size=65: expected at most 64"]),
        (["dataset=deepmth"], ["dataset=deepmth: expected arithmetic or deepmath"]),
        (["--learning_rate=1"], ["without dashes", "Write learning_rate=1"]),
        (["--learning_rate", "3"], ["Write learning_rate=3"]),
        (["learning_rate"], ["'learning_rate' is not an option", "key=value"]),
        (["=3"], ["key=value"]),
        (["a...=3"], ["wildcard"]),
    ],
)
def test_each_mistake_is_one_message_on_stderr_and_exit_code_2(capfd, argv, expected):
    code, out, err = run(capfd, "log_path=x", *argv)
    assert (code, out) == (2, "")
    for part in expected:
        assert part in err
    assert "Traceback" not in err and err.count("error:") == 1 and "Blueprint" not in err


def test_a_missing_option_is_named_with_its_type(capfd):
    code, _, err = run(capfd)
    assert code == 2 and "log_path=  (str)" in err


def test_help_prints_every_option_with_doc_and_default_and_exits_0(capfd):
    code, out, err = run(capfd, "--help")
    assert (code, err) == (0, "")
    for text in ("Trains something.", "learning_rate=0.0001  (float)", "peak learning rate"):
        assert text in out
    for text in ("log_path=(required)", "loss_fn=ppo  (one of ppo, cispo)", "decay of the moments"):
        assert text in out
    assert "optimizer.learning_rate=0.5  (float)" in out  # the default object's value, not its class's


@chz.chz
class Narrow(Config):
    @staticmethod
    def without() -> dict[str, str]:
        return {"optimizer": "nothing is optimized: leave it out"}


def test_an_option_that_a_config_is_without_is_not_listed_and_not_taken(capfd: pytest.CaptureFixture[str]):
    assert "optimizer" in help_text(Config) and "optimizer" not in help_text(Narrow)
    for given in ("optimizer=x", "optimizer.betas=1,2", "optimizer.learning_rate=0.5"):  # the last is the default
        with pytest.raises(ConfigError, match=f"^{given}: nothing is optimized: leave it out$"):
            parse_config(Narrow, ["log_path=x", given])


def test_help_shows_the_preset_and_comes_out_beside_a_mistake(capfd):
    code, out, _ = run(capfd, "dataset=deepmath", "--help")
    assert code == 0 and "learning_rate=0.0007 (preset)" in out
    assert run(capfd, "dataset=nonsense", "oops", "-h")[0] == 0


def test_the_code_that_main_returns_is_the_exit_code(capfd):
    assert run(capfd, "log_path=x", main=lambda config: 3)[0] == 3
    assert run(capfd, "log_path=x", main=lambda config: None)[0] == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("no such folder"), 2, "error: no such folder"),
        (CheckpointError("disk full"), 1, "error: disk full"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ExceptionGroup("tasks", [ExceptionGroup("inner", [ConfigError("bad row")])]), 2, "error: bad row"),
        (BaseExceptionGroup("tasks", [KeyboardInterrupt(), ValueError("x")]), 130, "interrupted"),
    ],
)
def test_errors_of_main_become_exit_codes_also_out_of_task_groups(capfd, error, code, message):
    def main(config):
        raise error

    assert run(capfd, "log_path=x", main=main) == (code, "", message + "\n")


@pytest.mark.parametrize("error", [ValueError("bug"), ExceptionGroup("g", [ConfigError("a"), KeyError("b")])])
def test_a_bug_keeps_its_traceback(error):
    def main(config):
        raise error

    with pytest.raises(type(error)) as raised:
        run_cli(main, Config, argv=["log_path=x"])
    assert raised.value is error


def test_a_long_path_comes_through_in_one_line_in_a_real_process():
    path = "/data/" + "very-long-folder-name/" * 20
    script = (
        "import chz\nfrom recipes.cli import run_cli\nfrom errors import DataError\n"
        "@chz.chz\nclass C:\n    path: str\n"
        "def main(c):\n    raise DataError(f'{c.path}: no such file')\n"
        "run_cli(main, C)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, f"path={path}"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"COLUMNS": "40", "PYTHONPATH": "."},
    )
    assert (done.returncode, done.stderr) == (2, f"error: {path}: no such file\n")
