"""The report of a run: what is on the page, that it stands alone, and that no size or damage of the files breaks it."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import socket
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from prl.cli import report
from prl.errors import UserError
from prl.report import plots, samples
from prl.report.charts import EVAL_CHARTS, STEP_CHARTS
from prl.report.load import load
from prl.report.page import render
from prl.report.plots import Series, line_chart, linear_ticks, readable, running_mean, stacked_chart, thinned
from prl.run_dir import RunDir

CONFIG = """
plugins = ["qwen3", "cispo"]
[run]
steps = 4
[model]
type = "qwen3"
[[environments]]
type = "reasoning_gym"
name = "words"
[losses.rl]
type = "cispo"
"""
LOCK = {
    "plugins": [{"name": "cispo", "dist": "prl-cispo", "version": "0.1.7", "module": "prl_cispo", "digest": "x"}],
    "python": "3.11.7",
    "libraries": {"torch": "2.13.0", "vllm": None},
}


def rl_row(step: int, **metrics: float) -> dict[str, Any]:
    row = {"phase": "rl", "step": step, "version": step, "time": 100.0 + step, "reward/mean": step / 10}
    return row | metrics


def evaluation(version: int, accuracy: float) -> dict[str, Any]:
    row = {"phase": "eval", "step": version, "version": version, "time": 100.0, "eval/version": version}
    return row | {"eval/words/accuracy": accuracy}


def rollout(
    step: int, *, reward: float, prompt: str = "spell sun", completion: str = "nus", task: int = 0
) -> dict[str, Any]:
    return {
        "step": step,
        "task": {"environment": "words", "split": "train", "index": task},
        "reward": reward,
        "advantage": reward - 0.5,
        "versions": [step - 2, step - 1],
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}],
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A finished run of four steps."""
    run = RunDir(tmp_path / "words-1")
    run.path.mkdir()
    run.config.write_text(CONFIG)
    run.lock.write_text(json.dumps(LOCK))
    run.state.write_text(json.dumps({"status": "finished", "step": 4, "steps": 4, "version": 4, "error": None}))
    steps = [
        rl_row(n, **{"staleness/0": 0.75, "staleness/1": 0.25, "mismatch/k3": 1e-9, "dropped/stale": 2.0})
        for n in range(1, 5)
    ]
    write_lines(run.metrics, [evaluation(0, 0.25), *steps, evaluation(4, 0.875)])
    write_lines(run.rollouts, [rollout(n, reward=n / 4, task=n) for n in range(1, 5)])
    return run


class Page(HTMLParser):
    """What a browser would fetch, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data"}]

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def test_the_page_says_what_the_run_was_and_how_it_went(run_dir: RunDir) -> None:
    text = Page(render(load(run_dir))).text
    assert "words-1" in text
    assert "finished" in text
    assert "qwen3 · words · cispo" in text
    assert "0.25 → 0.88" in text
    assert text[text.index("cispo") : text.index("cispo") + 3] == ["cispo", "prl-cispo", "0.1.7"]
    assert "python 3.11.7, torch 2.13.0" in text
    assert text[text.index("stale") : text.index("stale") + 2] == ["stale", "8"]


def test_the_page_stands_alone(run_dir: RunDir) -> None:
    html = render(load(run_dir))
    assert Page(html).fetched == []
    assert not re.search(r"https?://|@import|url\(", html)


def test_every_chart_with_data_is_drawn_and_no_other(run_dir: RunDir) -> None:
    page = Page(render(load(run_dir)))
    drawn = {chart.title for chart in (*EVAL_CHARTS, *STEP_CHARTS)} & set(page.text)
    assert drawn == {"Held-out accuracy", "Reward", "Staleness shares", "k3 mismatch"}
    assert page.tags.count("svg") == 4


def test_what_the_policy_wrote_is_text_and_never_markup(run_dir: RunDir) -> None:
    hostile = "</td><script>alert(1)</script>"
    write_lines(run_dir.rollouts, [rollout(1, reward=0.0, prompt=hostile, completion=hostile)])
    page = Page(render(load(run_dir)))
    assert page.text.count(hostile) == 2
    assert page.tags.count("script") == 1


def test_a_run_that_just_started_has_a_page(run_dir: RunDir) -> None:
    for path in (run_dir.metrics, run_dir.rollouts, run_dir.state):
        path.unlink()
    text = Page(render(load(run_dir))).text
    assert "No metrics were recorded yet." in text


def test_a_mean_over_one_environment_is_not_drawn_twice(run_dir: RunDir) -> None:
    write_lines(run_dir.metrics, [rl_row(n, **{"reward/words": n / 10}) for n in range(1, 5)])
    (reward,) = (chart for chart in STEP_CHARTS if chart.title == "Reward")
    assert [s.name for s in reward.series(load(run_dir).steps)] == ["words"]
    write_lines(run_dir.metrics, [rl_row(n, **{"reward/words": 0.5, "reward/sums": 0.0}) for n in range(1, 5)])
    assert [s.name for s in reward.series(load(run_dir).steps)] == ["sums", "words", "mean"]


def test_lines_that_are_being_written_are_left_out(run_dir: RunDir) -> None:
    for path in (run_dir.metrics, run_dir.rollouts):
        path.write_text(path.read_text() + '{"step": 5, "rew')
    record = load(run_dir)
    assert [row["step"] for row in record.steps] == [1, 2, 3, 4]
    assert {row["step"] for end in record.samples for row in (*end.best, *end.worst)} == {1, 2, 3, 4}


def test_a_step_that_was_repeated_after_a_resume_counts_once(run_dir: RunDir) -> None:
    write_lines(run_dir.metrics, [rl_row(1), rl_row(2), rl_row(2, **{"reward/mean": 0.9}), rl_row(3)])
    steps = load(run_dir).steps
    assert [(row["step"], row["reward/mean"]) for row in steps] == [(1, 0.1), (2, 0.9), (3, 0.3)]


def test_a_failed_run_shows_its_error(run_dir: RunDir) -> None:
    run_dir.state.write_text(json.dumps({"status": "failed", "error": "engine 0 <gone>"}))
    assert "engine 0 <gone>" in Page(render(load(run_dir))).text


# --- rollouts ---------------------------------------------------------------------------------------------------------
def test_rollouts_of_both_ends_best_and_worst(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_lines(path, [rollout(n, reward=(n % 3) / 2, task=n) for n in range(1, 121)])
    early, late = samples.sample(path)
    assert [row["reward"] for row in early.best] == [1.0, 1.0, 1.0]
    assert [row["reward"] for row in late.worst] == [0.0, 0.0, 0.0]
    assert max(row["step"] for row in (*early.best, *early.worst)) <= 12
    assert min(row["step"] for row in (*late.best, *late.worst)) >= 109


def test_shown_rollouts_are_of_different_tasks(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_lines(path, [rollout(1, reward=1.0, task=0) for _ in range(8)] + [rollout(1, reward=0.5, task=1)])
    (shown,) = samples.sample(path)
    assert [row["task"]["index"] for row in shown.worst] == [1, 0]
    assert [row["task"]["index"] for row in shown.best] == [0]


def test_only_the_ends_of_a_long_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "WINDOW_BYTES", 4096)
    path = tmp_path / "rollouts.jsonl"
    write_lines(path, [rollout(n, reward=0.5, task=n) for n in range(1, 501)])
    size = path.stat().st_size
    with path.open("r+b") as file:  # the middle is garbage: whoever reads it finds no line there
        file.seek(8192)
        file.write(b"\x00" * (size - 16384))
    early, late = samples.sample(path)
    assert {row["step"] for row in (*early.best, *early.worst)} <= set(range(1, 20))
    assert {row["step"] for row in (*late.best, *late.worst)} <= set(range(480, 501))


def test_no_rollouts_no_table(tmp_path: Path) -> None:
    assert samples.sample(tmp_path / "rollouts.jsonl") == []
    (tmp_path / "rollouts.jsonl").touch()
    assert samples.sample(tmp_path / "rollouts.jsonl") == []


# --- plots ------------------------------------------------------------------------------------------------------------
def path_points(svg: str) -> list[list[tuple[float, float]]]:
    """The corners of every path, from well-formed SVG."""
    paths = [e.attrib["d"] for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("path")]
    return [[tuple(map(float, p.split())) for p in re.split("[MLZ]", d) if p] for d in paths]  # type: ignore[misc]


def test_a_line_goes_from_corner_to_corner() -> None:
    (points,) = path_points(line_chart([Series(name="x", points=[(0, 0.0), (10, 1.0)])], from_zero=True))
    (left, bottom), (right, top) = points
    assert (left, right) == (plots.LEFT, plots.WIDTH - plots.RIGHT)
    assert bottom == plots.HEIGHT - plots.BOTTOM
    assert plots.TOP <= top < plots.TOP + 15


def test_decades_are_equally_far_apart_on_a_log_scale() -> None:
    points = [(0, 1e-9), (1, 0.0), (2, 1e-7), (3, 1e-5), (4, -1.0)]
    ((a, b, c),) = path_points(line_chart([Series(name="k3", points=points)], scale="log"))
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.2)
    assert line_chart([Series(name="k3", points=[(0, 0.0)])], scale="log") == ""


def test_shares_are_stacked_to_one() -> None:
    series = [Series(name=str(k), points=[(0, s), (1, s)]) for k, s in enumerate((0.25, 0.5, 0.25))]
    areas = path_points(stacked_chart(series))
    heights = [max(y for _, y in area) - min(y for _, y in area) for area in areas]
    inside = plots.HEIGHT - plots.TOP - plots.BOTTOM
    assert heights == pytest.approx([0.25 * inside, 0.5 * inside, 0.25 * inside], abs=0.2)


def test_long_curves_are_thinned_and_keep_their_mean() -> None:
    points = [(float(i), math.sin(i)) for i in range(10_000)]
    kept = thinned(points)
    assert len(kept) == plots.MOST_POINTS
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert running_mean([(0, 0.0), (1, 3.0), (2, 6.0)], 1) == [(0, 1.5), (1, 3.0), (2, 4.5)]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.013, 0.021), (150, 750), (0, 13_000), (1e-9, 3e-9)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    ticks = linear_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low <= tick <= high for tick in ticks)
    assert len({round(b - a, 12) for a, b in itertools.pairwise(ticks)}) == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.25, "0.25"),
        (2e-13, "2e-13"),
        (3.14e-9, "3.14e-9"),
        (12_340, "12.3k"),
        (4e6, "4M"),
        (-0.5, "-0.5"),
    ],
)
def test_readable_numbers(value: float, shown: str) -> None:
    assert readable(value) == shown


@pytest.mark.parametrize(
    ("values", "labels"),
    [((0.985, 1.0), ["0.985", "0.99", "0.995", "1"]), ((12_000, 18_000), ["12k", "14k", "16k", "18k"])],
)
def test_ticks_have_the_digits_that_tell_them_apart(values: tuple[float, float], labels: list[str]) -> None:
    svg = ElementTree.fromstring(line_chart([Series(name="x", points=list(enumerate(values)))]))
    shown = [e.text for e in svg.iter() if e.attrib.get("text-anchor") == "end"]
    assert [label for label in shown if label in labels] == labels


def test_a_single_point_is_a_dot() -> None:
    assert "<circle" in line_chart([Series(name="x", points=[(3, 0.5)])])


# --- the command ------------------------------------------------------------------------------------------------------
def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    report.register(parser.add_subparsers())
    return parser.parse_args(["report", *words])


def test_the_command_writes_beside_the_run_or_where_it_is_told(run_dir: RunDir, tmp_path: Path) -> None:
    for parsed, expected in (
        (arguments(str(run_dir.path)), run_dir.path / "report.html"),
        (arguments(str(run_dir.path), "--output", str(tmp_path / "x.html")), tmp_path / "x.html"),
    ):
        assert parsed.run(parsed) == 0
        assert expected.read_text().startswith("<!doctype html>")


def test_a_run_whose_processes_are_gone_is_called_killed(run_dir: RunDir) -> None:
    run_dir.state.write_text(json.dumps({"status": "running"}))
    gone = {"role": "controller", "index": 0, "pid": 2**22 + 1, "host": socket.gethostname(), "log": "x"}
    run_dir.processes.write_text(json.dumps([gone]))
    parsed = arguments(str(run_dir.path))
    assert parsed.run(parsed) == 0
    assert "killed" in Page((run_dir.path / "report.html").read_text()).text


def test_the_command_refuses_what_is_no_run_and_a_place_it_cannot_write_to(run_dir: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder of runs: name one of words-1"):
        report.run(arguments(str(tmp_path)))
    with pytest.raises(UserError, match="cannot write the report"):
        report.run(arguments(str(run_dir.path), "--output", str(tmp_path / "nowhere" / "x.html")))
