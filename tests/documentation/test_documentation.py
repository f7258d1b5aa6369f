"""Every example of README and docs/ does what the page says; `tests.documentation.pages` says how each is marked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deepspeed.config import load_config
from tests.documentation.examples import plan_commands, run_python, run_script, train_with
from tests.documentation.pages import LANGUAGES, ROOT, Block, Page, check_output, pages
from tests.pool import Pool

PAGES = pages()
NEEDS = {
    ("docs/checkpoint-format.md", "xxhash"),
    ("docs/integrations.md", "transformers"),
    ("docs/monitoring.md", "wandb,comet_ml"),
}
"""What examples may need that is not here: by page. Those of integrations.md run in tests/integrations."""


def each_page(*languages: str) -> pytest.MarkDecorator:
    """The pages that have examples in one of the languages."""
    chosen = [page for page in PAGES if any(page.running(language) for language in languages or LANGUAGES)]
    return pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in chosen])


def each_block(language: str) -> pytest.MarkDecorator:
    """The examples in one language, with their pages."""
    found = [(page, block) for page in PAGES for block in page.running(language)]
    return pytest.mark.parametrize(("page", "block"), [pytest.param(*pair, id=pair[1].place) for pair in found])


def test_every_example_says_what_it_is_and_is_run_or_listed() -> None:
    blocks = [block for page in PAGES for block in page.blocks]
    assert [block.place for block in blocks if block.language not in LANGUAGES] == []
    assert {key for block in blocks for key in block.options} <= {"file", "needs", "run", "figures"}
    compared = [page.output_of(block) for page in PAGES for block in page.blocks if block.runs and "run" not in block.options]
    outputs = [block for block in blocks if block.language == "text" and "file" not in block.options]
    assert [block.place for block in outputs if block not in compared] == []
    assert {(block.page, block.options["needs"]) for block in blocks if "needs" in block.options} == NEEDS


def test_a_program_is_run_by_a_command_of_its_page() -> None:
    for page in PAGES:
        commands = "".join(block.text for block in page.running("sh"))
        programs = [block.options["file"] for block in page.blocks if block.language == "python" and "file" in block.options]
        assert [name for name in programs if name not in commands] == [], page.name


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_what_a_page_names_is_there(page: Page) -> None:
    assert [path for path in page.named_paths if not (ROOT / path).exists()] == []
    unrun = [block.text for block in page.blocks if block.language == "json" and not block.runs]
    for configuration in [*page.inline_configurations, *unrun]:
        load_config(configuration, world_size=2)


@pytest.fixture(scope="module")
def own_ranks() -> Iterator[Callable[..., list[Any]]]:
    """``ranks`` in processes of these tests alone: a page may show what is configured for a whole process."""
    pool = Pool()
    yield pool.run
    pool.close()


@each_page("python")
def test_the_python_of_a_page_runs_on_two_ranks(page: Page, own_ranks, tmp_path) -> None:
    page.write_files(tmp_path)
    blocks = page.running("python")
    printed, _ = own_ranks(2, run_python, blocks, str(tmp_path))
    for block, text in zip(blocks, printed, strict=True):
        check_output(text, page.output_of(block))


@each_block("json")
def test_a_model_trains_with_the_configuration(page: Page, block: Block, ranks, tmp_path) -> None:
    printed, _ = ranks(2, train_with, block.text, str(tmp_path))
    assert "has no effect" not in printed
    check_output(printed, page.output_of(block))


@each_block("sh")
def test_the_commands_work(page: Page, block: Block, tmp_path, monkeypatch) -> None:
    page.write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    if block.options.get("run") == "dry":
        plan_commands(block.text, monkeypatch)
    else:
        check_output(run_script(block.text, tmp_path), page.output_of(block))
