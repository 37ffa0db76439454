"""The console as a person sees it: the plain lines, the live panel and the summary."""

from __future__ import annotations

import io
from collections.abc import Mapping

import attrs
import pytest
from prl_console import lines, text
from prl_console.live import panel
from prl_console.tracker import ConsoleTracker, as_typed
from prl_console.view import RunView
from rich.console import Console

RL_METRICS: Mapping[str, float] = {
    "phase": "rl",  # type: ignore[dict-item]
    "reward/mean": 0.61,
    "staleness/mean": 0.9,
    "staleness/max": 2.0,
    "staleness/0": 0.25,
    "staleness/1": 0.6,
    "staleness/2": 0.15,
    "mismatch/k3": 3.1e-9,
    "mismatch/k3_fresh": 2e-13,
    "tokens/per_second": 12_340.0,
    "idle/trainer": 0.12,
    "idle/engine": 0.04,
    "dropped/stale": 2.0,
    "progress/seconds_left": 190.0,
}


@attrs.define
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def view(clock: Clock) -> RunView:
    return RunView(name="demo", directory="runs/demo", steps=600, clock=clock)


def evaluation(accuracy: float, version: int, environment: str = "words") -> dict[str, float]:
    return {f"eval/{environment}/accuracy": accuracy, "eval/version": version}


def plain(view: RunView) -> tuple[ConsoleTracker, io.StringIO]:
    out = io.StringIO()
    return ConsoleTracker(view, Console(file=out, width=80), interval=1.0), out


def drawn(view: RunView, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(panel(view, width))
    return out.getvalue().splitlines()


def test_step_line_says_everything_in_one_line(view: RunView) -> None:
    view.update(119, evaluation(0.74, 118))
    view.update(120, RL_METRICS)
    assert lines.step_line(view) == (
        "step 120/600  reward 0.61  held-out 0.74  staleness 0.90 max 2  k3 3.1e-09  12.3k tok/s  left 3m10s"
    )


def test_warmup_line_shows_the_supervised_loss(view: RunView) -> None:
    view.update(7, {"phase": "warmup", "loss/ce": 1.25})  # type: ignore[dict-item]
    assert lines.step_line(view) == "step   7/600  warm-up  loss 1.250  left -"


def test_plain_lines_are_limited_in_rate_but_evaluations_and_the_last_step_are_not(view: RunView, clock: Clock) -> None:
    tracker, out = plain(view)
    tracker.start()
    for step in range(1, 11):
        clock.now += 0.3
        tracker.log(step, RL_METRICS)
    tracker.log(3, evaluation(0.5, 3))
    tracker.log(600, RL_METRICS)
    written = out.getvalue().splitlines()
    assert written[0] == "demo: 600 steps, files in runs/demo"
    assert [line.split()[1] for line in written[1:4]] == ["1/600", "5/600", "9/600"]
    assert written[4] == "held-out accuracy of version 3: 0.50"
    assert written[5].startswith("step 600/600")
    assert len(written) == 6


def test_finish_tells_what_was_achieved_and_where_to_look(view: RunView, clock: Clock) -> None:
    tracker, out = plain(view)
    tracker.log(1, evaluation(0.38, 0))
    tracker.log(2, evaluation(0.9, 300))
    tracker.log(3, evaluation(0.84, 600))
    tracker.log(600, RL_METRICS)
    clock.now = 252.0
    tracker.finish(None)
    assert out.getvalue().splitlines()[-4:] == [
        "demo finished in 4m12s, 600 of 600 steps",
        "  held-out  words accuracy 0.38 -> 0.84 (best 0.90)",
        "  curves    prl report runs/demo",
        "  logs      prl logs runs/demo",
    ]


def test_commands_can_be_pasted_where_the_directory_has_a_space(clock: Clock) -> None:
    tracker, out = plain(RunView(name="demo", directory="my runs/demo", steps=600, clock=clock))
    tracker.finish(None)
    assert out.getvalue().splitlines()[-1] == "  logs      prl logs 'my runs/demo'"


def test_a_failed_run_says_so_with_its_error(view: RunView) -> None:
    tracker, out = plain(view)
    tracker.log(12, RL_METRICS)
    tracker.finish(RuntimeError("engine 0 [gone]"))
    written = out.getvalue().splitlines()
    assert "demo failed after 0s, 12 of 600 steps" in written
    assert "  error     engine 0 [gone]" in written


def test_a_stopped_run_did_not_finish(view: RunView) -> None:
    view.update(12, RL_METRICS)
    assert lines.summary(view, None)[0] == "demo stopped in 0s, 12 of 600 steps"


def test_panel_shows_every_quantity(view: RunView) -> None:
    view.update(119, evaluation(0.38, 0))
    view.update(119, evaluation(0.74, 118))
    view.update(120, RL_METRICS)
    shown = "\n".join(drawn(view))
    for expected in (
        "120/600  0s, left 3m10s",
        "reward       0.61",
        "held-out     0.74    ▁█  best 0.74, first 0.38",
        "staleness    0.90    mean, max 2",
        "k3 mismatch  3.1e-09 all, 2.0e-13 fresh",
        "tokens/s     12.3k",
        "idle         12%     trainer, 4% engine",
        "dropped      2 groups: stale 2",
        "prl report runs/demo",
    ):
        assert expected in shown


def test_staleness_bars_are_proportional(view: RunView) -> None:
    view.update(1, RL_METRICS)
    bars = [line.count("█") for line in drawn(view) if "█" in line and line.rstrip(" │").endswith("%")]
    assert len(bars) == 3
    assert bars[1] > 2 * bars[0] > 2 * bars[2] > 0


def test_many_staleness_values_are_added_up_in_the_last_bar(view: RunView) -> None:
    view.update(1, {"phase": "rl", "reward/mean": 0.5, **{f"staleness/{k}": 0.125 for k in range(8)}})  # type: ignore[dict-item]
    assert any("4+ " in line and "50%" in line for line in drawn(view))


def test_a_share_that_was_not_logged_again_is_gone(view: RunView) -> None:
    view.update(1, RL_METRICS)
    view.update(2, {"phase": "rl", "reward/mean": 0.5, "staleness/0": 1.0})  # type: ignore[dict-item]
    assert view.staleness_shares == {0: 1.0}


@pytest.mark.parametrize("width", [60, 80, 100])
def test_panel_keeps_its_width_whatever_is_in_it(view: RunView, width: int) -> None:
    for step in range(1, 500):
        view.update(step, {**RL_METRICS, "reward/mean": step / 500, "dropped/a_very_long_reason_indeed" * 3: 9.0})
        view.update(step, evaluation(step / 500, step, "an_environment_with_a_long_name"))
        view.update(step, evaluation(step / 500, step, "another"))
    assert {len(line) for line in drawn(view, width)} == {width}


def test_time_left_runs_down_between_steps(view: RunView, clock: Clock) -> None:
    view.update(1, RL_METRICS)
    clock.now += 40
    assert view.seconds_left == 150
    clock.now += 400
    assert view.seconds_left == 0


def test_live_display_is_used_on_a_terminal_only(view: RunView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    out = io.StringIO()
    tracker = ConsoleTracker(view, Console(file=out, width=80, force_terminal=True), interval=60.0)
    tracker.start()
    tracker.log(120, RL_METRICS)
    tracker.finish(None)
    assert "reward" in out.getvalue()
    assert "step 120/600" not in out.getvalue()
    assert "demo stopped" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (190, "3m10s"), (7260, "2h01m"), (None, "-")]
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (950, "950"), (999.9, "1.0k"), (12_340, "12.3k"), (4e6, "4.0M"), (2.5e9, "2.5G")]
)
def test_counts(value: float, shown: str) -> None:
    assert text.count(value) == shown


def test_sparkline_averages_into_its_width() -> None:
    assert text.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 4) == "▁▃▆█"
    assert text.sparkline([5.0, 5.0], 10) == "▁▁"
    assert text.sparkline([4.0, 5.0, 6.0], 3, floor=0.0) == "▆▇█"
    assert text.sparkline([], 10) == ""


def test_bar_is_never_invisible_when_there_is_something() -> None:
    assert text.bar(0.001, 10) == "▏"
    assert text.bar(0.0, 10) == ""
    assert text.bar(1.0, 10) == "█" * 10


def test_paths_are_shown_as_typed(tmp_path) -> None:
    run = tmp_path / "runs" / "x"
    assert as_typed(run, relative_to=lambda: str(tmp_path)) == "runs/x"
    assert as_typed(run, relative_to=lambda: str(tmp_path / "elsewhere")) == str(run)
