"""The report is one self-contained file that shows what was measured and runs nothing that it shows."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from errors import ConfigError
from training.report import CHARTS, write_report
from training.run_dir import open_run_dir

EVIL = "<script>alert('x')</script> & $a_1$ \"quoted\" <img src=x onerror=y>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose report is written, once: its plots take a second."""
    config = {"model_name": EVIL, "optimizer": {"learning_rate": 1e-4}}
    with open_run_dir(tmp_path_factory.mktemp("reported") / "my <run>", config, interactive=False) as run:
        run.append_metrics(evaluation(0, 0.25, 2.0))
        for step in range(1, 11):
            run.append_metrics(
                {
                    "step": step,
                    "kl": 2.0 / step**2,
                    "loss": 1.0 / step,
                    "accuracy": step / 20,
                    "ratio/mean": 1.0,
                    "ratio/max": 1.5,
                    "mismatch_kl": None,
                    "truncated_fraction": 0.1,
                    "completion_tokens_mean": 60.0,
                    "time/sampling": 3.0,
                    "time/training": 1.0,
                    "time/other": 0.2,
                    "peak_memory_mb": 512.0,
                }
            )
        run.append_metrics(evaluation(10, 0.75, 0.5))
        run.write_episodes(1, [{"completion": EVIL}])
        with open(run.metrics_path, "a") as file:
            file.write('{"step": 11, "kl"')  # torn
        write_report(run.path)
        yield run


@pytest.fixture
def bare(tmp_path):
    """A run without rows: without plots, which take a second."""
    with open_run_dir(tmp_path / "bare", {"model_name": EVIL}, interactive=False) as run:
        yield run


def evaluation(step, accuracy, kl):
    return {
        "step": step,
        "eval/accuracy": accuracy,
        "eval/accuracy_se": 0.04,
        "eval/reverse_kl": kl,
        "eval/reverse_kl_se": 0.01,
        "eval/length": 50.0,
    }


class Page(HTMLParser):
    """Collects tags, links and text; void tags aside, checks that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.remove(tag)

    def handle_data(self, data):
        self.text += data


def page(run):
    file = write_report(run.path)
    assert file == run.report_path
    return Page(file.read_text())


def test_it_needs_no_script_and_no_network(run):
    shown = Page(run.report_path.read_text())
    assert "script" not in shown.tags and "img" not in shown.tags and shown.open == []
    assert all(link.startswith("#") for link in shown.links)
    assert not re.search(r"url\((?!#)|@import", run.report_path.read_text())


def test_it_draws_what_was_measured_and_leaves_out_the_rest(run):
    text = run.report_path.read_text()
    titles = [chart.title for chart in CHARTS if chart.title in text]
    assert "KL to the teacher, nats per token" in titles and "Accuracy" in titles
    assert "Seconds per step, by stage" in titles and "Peak memory, MiB" in titles
    assert not [title for title in titles if title.startswith(("Sampler mismatch", "Tokens per second"))]
    assert Page(text).tags.count("svg") == len(titles)
    ids = re.findall(r'<clipPath id="([^"]+)"', text)
    assert "mathdefault" not in text and ">0.1<" in text  # ticks of the logarithmic axis are plain numbers
    assert len(ids) == len(set(ids)) > 0  # the plots do not refer to each other's parts


def test_the_table_compares_first_and_last_evaluation_with_errors(run):
    text = Page(run.report_path.read_text()).text
    for part in ("step 0", "step 10", "0.25 ± 0.04", "0.75 ± 0.04", "+0.5", "2 ± 0.01", "0.5 ± 0.01", "-1.5"):
        assert part in text
    assert "accuracy_se" not in text


def test_accuracy_has_error_bars_only_where_a_standard_error_was_measured(run, bare):
    assert run.report_path.read_text().count('id="LineCollection') == 2  # accuracy and KL, held-out
    for row in (evaluation(0, 0.25, 2.0), evaluation(10, 0.75, 0.5)):
        bare.append_metrics({key: value for key, value in row.items() if not key.endswith("_se")})
    assert "svg" in page(bare).tags
    assert "LineCollection" not in bare.report_path.read_text()


def test_text_of_models_users_and_datasets_is_shown_as_text(bare):
    messages = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": None}]
    row = {"dataset": EVIL, "prompt_messages": messages, "completion": "two\n" + EVIL, "token_ids": [1, 2]}
    bare.write_episodes(3, [row])
    shown = page(bare)
    assert shown.text.count(EVIL) == 5  # config, dataset (also in the summary), message, completion
    assert f"[user] {EVIL}" in shown.text and "token_ids: 2 values" in shown.text


def test_sampled_tokens_are_shaded_by_what_the_teacher_thought(bare):
    row = {
        "tokens": ["<b>", "good", "bad"],
        "sampler_logprobs": [None, -2.0, -0.5],
        "teacher_logprobs": [None, -0.5, -3.0],
    }
    bare.write_episodes(1, [row])
    page(bare)
    text = bare.report_path.read_text()
    assert 'title="+1.50">good' in text and 'title="-2.50">bad' in text and "&lt;b&gt;</span>" in text


def test_a_few_episodes_of_the_first_and_last_step(bare):
    for step in (2, 5, 10):
        bare.write_episodes(step, [{"row_id": f"{step}-{n}"} for n in range(50)])
    shown = page(bare)
    assert shown.tags.count("details") == 6
    assert "2-0" in shown.text and "10-2" in shown.text and "5-0" not in shown.text


def test_a_run_without_rows_and_a_torn_last_row_still_give_a_report(run, bare):
    assert "10 training steps, last step 10" in Page(run.report_path.read_text()).text
    assert "no training step yet" in page(bare).text


def test_a_folder_without_a_run_is_refused_and_left_alone(tmp_path):
    with pytest.raises(ConfigError, match="not a run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_reports_of_one_run_are_equal(run):
    first = run.report_path.read_bytes()
    assert write_report(run.path).read_bytes() == first


def test_importing_it_does_not_import_matplotlib():
    script = "import sys, training.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2]).returncode == 0
