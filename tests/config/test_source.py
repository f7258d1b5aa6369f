from __future__ import annotations

import base64
import json
from collections import UserDict
from pathlib import Path

import pytest

from deepspeed.config import ConfigError, load_config

CONFIG = {"train_batch_size": 4, "zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    "form",
    [
        lambda path: CONFIG,
        lambda path: UserDict(CONFIG),
        lambda path: path,
        lambda path: str(path),
        lambda path: json.dumps(CONFIG),
        lambda path: "\n " + json.dumps(CONFIG),
        lambda path: base64.b64encode(json.dumps(CONFIG).encode()).decode(),
        lambda path: base64.urlsafe_b64encode(json.dumps(CONFIG).encode()).decode().rstrip("="),
    ],
)
def test_every_form_of_a_configuration_is_read_alike(form, tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(CONFIG))
    config = load_config(form(path))
    assert config.raw == CONFIG
    assert (config.train_batch_size, config.zero_optimization.stage) == (4, 1)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8-sig")
    assert load_config(path).train_batch_size == 4


def test_what_was_given_is_not_changed_and_not_shared():
    given = {"zero_optimization": {"stage": "auto", "cpu_offload": False}, "train_batch_size": "auto"}
    before = json.dumps(given)
    config = load_config(given)
    assert json.dumps(given) == before
    assert config.raw == given
    config.raw["zero_optimization"]["stage"] = 7
    assert json.dumps(given) == before


def said(source: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return str(caught.value)


def written(directory: Path, content: str | bytes) -> Path:
    path = directory / "ds_config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_malformed_json_is_shown_with_file_line_and_column(tmp_path):
    path = written(tmp_path, '{\n  "train_batch_size": 4,\n  "fp16": {"enabled": tru}\n}')
    message = said(path)
    assert f"{path}, line 3, column 23: this is not JSON" in message
    *_, line, mark = message.splitlines()
    assert line[mark.index("^") :].startswith("tru}")


def test_a_trailing_comma_is_shown_in_a_string_too():
    assert "the JSON string, line 1, column" in said('{"train_batch_size": 4,}')


def test_a_key_written_twice_is_named_with_its_lines(tmp_path):
    message = said(written(tmp_path, '{\n "fp16": {},\n "bf16": {},\n "fp16": {}\n}'))
    assert "the key 'fp16' is written twice" in message
    assert "lines 2, 4" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[1, 2]", "a configuration is a JSON object {...}; found [1, 2]"),
        ("3", "a configuration is a JSON object {...}; found 3"),
        ("null", "a configuration is a JSON object {...}; found null"),
        (b"\xff\xfe{", "is not a text file in UTF-8"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_object_says_what_it_is(tmp_path, content, message):
    path = written(tmp_path, content)
    assert str(path) in said(path)
    assert message in said(path)


def test_a_missing_file_says_from_where_relative_paths_are_read():
    message = said("no_such_config.json")
    assert "no_such_config.json" in message
    assert str(Path.cwd()) in message
    assert "No such file" in said(Path("no_such_config.json"))


def test_a_directory_is_called_one(tmp_path):
    assert "directory" in said(tmp_path).lower()
    assert "directory" in said(str(tmp_path)).lower()


@pytest.mark.parametrize("text", ["eyJhIjogMX0$", "not base64!", base64.b64encode(b"[1]").decode(), ""])
def test_bad_base64_is_none_of_the_three_forms(text):
    assert "nor base64 of JSON" in said(text)


@pytest.mark.parametrize("text", [b"{ x}", b'{"a": 1'])
def test_malformed_or_truncated_json_in_base64_is_shown(text):
    assert "the base64 string, line 1, column" in said(base64.b64encode(text).decode())


@pytest.mark.parametrize("source", [3, None, ["a"], True])
def test_another_type_is_named(source):
    assert type(source).__name__ in said(source)


def test_a_key_that_is_no_string_is_named():
    assert "zero_optimization: keys are strings; found the key 3" in said({"zero_optimization": {3: 4}})


def test_a_list_in_a_string_is_told_that_an_object_is_needed():
    assert "a configuration is a JSON object" in said("[1]")


def test_a_dictionary_that_contains_itself_is_told():
    config: dict[str, object] = {}
    config["fp16"] = config
    assert "contain themselves" in said(config)
