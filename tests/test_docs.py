"""What the documentation says is so: signatures, fields, code, commands and links."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from prl import hookspecs

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("contrib/*/*.md"), *ROOT.glob("benchmarks/*.md")]
)
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("prl_"))


def signature(hook: str) -> str:
    """As it is written in hookspecs.py, without `def`."""
    return f"{hook}{inspect.signature(getattr(hookspecs, hook))}".replace("'", "")


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_are_documented_with_their_signature(hook: str) -> None:
    documented = (ROOT / "docs/hooks.md").read_text().replace("\\|", "|")
    assert f"`{signature(hook)}`" in documented


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_config", ROOT / "docs/generate_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_field_of_the_config_is_documented() -> None:
    module = generator()
    assert module.page() == module.PAGE.read_text(), "run: python docs/generate_config.py"


def quoted(page: Path) -> Iterator[tuple[str, str]]:
    """(path, code) of every fenced block whose first line names a file of the repository."""
    for match in re.finditer(r"^```\w+ (\S+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


@pytest.mark.parametrize(
    ("path", "code"), [pytest.param(*block, id=f"{p.name}:{block[0]}") for p in PAGES for block in quoted(p)]
)
def test_quoted_code_is_that_of_the_file(path: str, code: str) -> None:
    assert code in (ROOT / path).read_text()


def anchor(heading: str) -> str:
    """What a heading is linked by on code hosts."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} of {page.name}"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{target} of {page.name}"


def test_the_readme_opens_with_the_two_commands() -> None:
    blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks[0].endswith("prl launch configs/spell_backward.toml\n")
    assert blocks[1].endswith('-e ".[test]" && pytest\n')


def test_continuous_integration_runs_the_command_of_the_readme() -> None:
    pattern = re.search(r"grep -m1 '(.+)' README.md", (ROOT / ".ci/run").read_text())
    assert pattern is not None
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if re.search(pattern[1], line)]
    assert len(commands) == 1
    assert ".venv" in commands[0]


def test_configs_that_are_mentioned_exist() -> None:
    for page in PAGES:
        for path in re.findall(r"\b((?:configs|benchmarks)/[\w/]+\.(?:toml|py|jsonl))\b", page.read_text()):
            assert (ROOT / path).is_file(), f"{path} in {page.name}"


def commands() -> list[str]:
    """Every `prl launch` and `prl config check` of the pages that can be composed here.

    Those with contrib/prl-cispo are in test_contrib.py.
    """
    absent = [name for name in ("vllm",) if importlib.util.find_spec(name) is None]
    lines = [line.removeprefix("$ ") for page in PAGES for line in page.read_text().splitlines()]
    return sorted(
        {
            line
            for line in lines
            if re.match(r"prl (launch|config check) configs/", line)
            and not any(name in line for name in ("cispo", *absent))
        }
    )


@pytest.mark.parametrize("command", commands())
def test_quoted_commands_are_what_they_claim(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composed, not run: the ones that show mistakes are refused with what the page says, the others are accepted."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)[1:]
    words = ["config", "check", *words[1:]] if words[0] == "launch" else words
    words = [word for word in words if word != "--dry-run"]
    finished = subprocess.run([sys.executable, "-m", "prl", *words], capture_output=True, text=True)
    if finished.returncode:
        assert f"$ {command}\n{finished.stderr}```" in "".join(page.read_text() for page in PAGES)
