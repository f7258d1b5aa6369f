from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepspeed.config import DeepSpeedConfig, load_config
from deepspeed.config.renames import RENAMES
from deepspeed.config.schema import DRAFT, json_schema
from deepspeed.config.section import fields
from tests.config.test_integrations import ACCELERATE, LIGHTNING, TRANSFORMERS
from tests.config.test_unbuilt import SWITCHED_ON

SCHEMA = json_schema()
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("**/ds_config*.json"))


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


def definition(path: str) -> dict[str, Any]:
    """The schema of the key ``path``."""
    found = SCHEMA
    for name in path.split("."):
        found = found["properties"][name]
        for option in found.get("anyOf", []):
            if "$ref" in option:
                found = SCHEMA["$defs"][option["$ref"].rpartition("/")[2]]
    return found


def test_the_schema_is_of_draft_2020_12():
    assert SCHEMA["$schema"] == DRAFT


@pytest.mark.parametrize(("path", "field"), list(fields(DeepSpeedConfig)))
def test_every_key_has_its_description_and_default(path, field):
    found = definition(path)
    assert field.description in found["description"]
    assert field.is_required() or found["default"] == field.default
    assert {"const": "auto"} in found["anyOf"] and {"type": "null"} in found["anyOf"]


@pytest.mark.parametrize("rename", RENAMES, ids=lambda rename: rename.old)
def test_other_names_are_known_and_deprecated_ones_marked(rename):
    found = definition(rename.old)
    assert found.get("deprecated", False) == rename.deprecated
    assert all(new in found["description"] for new in rename.new)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_the_examples_are_valid(validator, path):
    validator.validate(json.loads(path.read_text()))


@pytest.mark.parametrize(
    "config",
    [
        *SWITCHED_ON.values(),
        LIGHTNING,
        {**ACCELERATE, "steps_per_print": None},
        TRANSFORMERS,
        {"$schema": "./ds_config.schema.json", "train_batch_size": "5e2", "fp16": None, "bf16": "auto"},
        {
            "zero_optimization": {"offload_optimizer": False, "reduce_bucket_size": 5e8},
            "checkpoint": {"tag_validation": "Warn"},
        },
        {"zero_optimization": True, "zero_optimization.reduce_bucket_size": 5, "log_level": "INFO"},
        {"torch_autocast": {"dtype": "bfloat16"}, "communication_data_type": "half"},
    ],
)
def test_what_the_loader_understands_is_valid(validator, config):
    validator.validate(config)


@pytest.mark.parametrize(
    "config",
    [
        {"gradient_clipp1ng": 1.0},
        {"zero_optimization": {"stage": 4}},
        {"zero_optimization": {"reduce_bucket_siz": 4}},
        {"zero_optimization": {"reduce_bucket_size": True}},
        {"zero_optimization": {"reduce_bucket_size": 1.5}},
        {"gradient_clipping": "much"},
        {"fp16": {"enabled": "perhaps"}},
        {"optimizer": {"params": {}}},
        {"log_level": "loud"},
    ],
)
def test_what_the_loader_refuses_is_not(validator, config):
    assert not validator.is_valid(config)
    with pytest.raises(ValueError, match="problem"):
        load_config(config)
