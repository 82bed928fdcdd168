"""Run settings: files, overrides, and errors that name file, key and fix."""

import dataclasses
import json
import re

import pytest

from lora_grpo.config import RunConfig
from lora_grpo.config_file import describe_settings, load_config, save_config
from lora_grpo.errors import ConfigError
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.sections import section_of
from lora_grpo.trl_names import TRL_SETTINGS

SECTIONS = [section_of(field.annotation)[0] for field in RunConfig.model_fields.values()]

TOML = """
output_dir = "runs/t"

[model]
name = "some/model"

[data]
train = "train.jsonl"

[[rewards]]
name = "numeric"

[[rewards]]
name = "format"
weight = 0.2
options.pattern = '\\d+'

[lora]
target_modules = ["q_proj", "v_proj"]
rank_pattern = { "layers\\\\.0.*" = 4 }

[grpo]
learning_rate = 2e-5
"""


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    return path


def test_a_file_becomes_a_run_config(config_path):
    config = load_config(config_path)
    assert config.grpo.learning_rate == 2e-5
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert [reward.weight for reward in config.rewards] == [1.0, 0.2]
    assert config.rewards[1].options == {"pattern": r"\d+"}
    assert config.engine.max_loras == 2


def test_resolved_settings_load_back_equal_and_can_be_overridden(config_path, tmp_path):
    config = load_config(config_path, ["grpo.learning_rate=0.1", "grpo.adam_epsilon=1e-7"])
    config = config.replace(grpo=config.grpo.replace(chat_template_kwargs={"tone": "ü, \ud800"}))
    saved = save_config(config, tmp_path / "run")
    assert load_config(saved) == config
    assert load_config(saved, ["grpo.beta=0.5"]).grpo.beta == 0.5
    assert json.loads(saved.read_text())["grpo"]["total_steps"] == 100


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("grpo.learning_rate=1e-4", "grpo", "learning_rate", 1e-4),
        ("grpo.scale_rewards=none", "grpo", "scale_rewards", "none"),
        ("grpo.mask_truncated_completions=true", "grpo", "mask_truncated_completions", True),
        ("model.name=Qwen/Qwen2.5-0.5B", "model", "name", "Qwen/Qwen2.5-0.5B"),
        ('lora.target_modules=["up_proj"]', "lora", "target_modules", ("up_proj",)),
        ("lora.target_modules=all-linear", "lora", "target_modules", "all-linear"),
        ("lora.target_modules=", "lora", "target_modules", "all-linear"),
        ("grpo.learning_rate=", "grpo", "learning_rate", 1e-6),
        ("lora.target_modules=null", "lora", "target_modules", "all-linear"),
        ("data.system_prompt=null", "data", "system_prompt", None),
        ('data.system_prompt="null"', "data", "system_prompt", "null"),
        ("data.system_prompt=a = b", "data", "system_prompt", "a = b"),
        ("grpo.epsilon=.3", "grpo", "epsilon", 0.3),
    ],
)
def test_overrides(config_path, override, section, key, value):
    assert getattr(getattr(load_config(config_path, [override]), section), key) == value


def test_overrides_reach_into_lists_and_make_sections(config_path):
    config = load_config(config_path, ["rewards.1.weight=3", "rewards.1.options.pattern=x+", "engine.max_loras=4"])
    assert config.rewards[1].weight == 3
    assert config.rewards[1].options == {"pattern": "x+"}
    assert config.engine.max_loras == 4
    added = load_config(config_path, ["rewards.2.name=my_module:mine", "rewards.2.weight=0.5"])
    assert [reward.name for reward in added.rewards] == [*(reward.name for reward in config.rewards), "my_module:mine"]
    assert added.rewards[2].weight == 0.5
    config_path.write_text(TOML.partition("[[rewards]]")[0])
    assert load_config(config_path, ["rewards.0.name=exact"]).rewards[0].name == "exact"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grpo.learning_rat=1", ["grpo.learning_rat=1", "'learning_rat'", "did you mean 'learning_rate'?"]),
        ("gpro.beta=1", ["'gpro'", "'grpo'"]),
        ("grpo.beta", ["not of the form section.key=value"]),
        ("rewards.7.weight=1", ["'7'", "list of 2", "count from 0", "2 adds one"]),
        ("rewards.2.weight=1", ["rewards.2.name", "needed"]),
        ("rewards.0.wieght=1", ["'wieght'", "'weight'"]),
        ("lora.target_modules=[q_proj]", ["not valid TOML", "quotes"]),
        ("grpo.beta=-1", ["run.toml", "grpo.beta", "got -1"]),
        ("grpo.loss_type=ppo", ["grpo.loss_type", '"bnpo" | ', '"dapo" | ', "got 'ppo'"]),
        ("grpo.beta=inf", ["run.toml", "grpo.beta: must be a number, at least 0, finite (got inf)"]),
        ("model=some/model", ["model: must be a [model] table (got 'some/model')"]),
        ("rewards=exact", ["rewards: must be [[rewards]] tables, 1 or more (got 'exact')"]),
        ("lora.rank_pattern.x=a", ["lora.rank_pattern: must be a table of integer (got {"]),
        ("learning_rate=1", ["'learning_rate=1'", "did you mean 'grpo.learning_rate'?"]),
        ("weight=1", ["did you mean 'rewards.0.weight'?"]),
        ("model.name.x=1", ["'name'", "some/model", "no keys"]),
        ("grpo.reward_weights=[1, 0.5]", ["grpo.reward_weights=[1.0, 0.5]", "rewards.N.weight"]),
    ],
)
def test_bad_overrides_name_key_value_and_fix(config_path, override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(config_path, [override])
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda text: text.replace("learning_rate", "learning_rat"), ["grpo.learning_rat", "'learning_rate'"]),
        (lambda text: text.replace("weight = 0.2", "wieght = 0.2"), ["rewards.1.wieght", "'weight'"]),
        (lambda text: text.replace('name = "some/model"', ""), ["model.name", "needed", "hub name"]),
        (lambda text: text.replace("[grpo]", "[gpro]"), ["gpro", "did you mean 'grpo'?"]),
        (lambda text: "learning_rate = 1\n" + text, ["learning_rate: unknown key; did you mean 'grpo.learning_rate'?"]),
        (lambda text: text.replace("2e-5", "2e-5 x"), ["not valid TOML", "line"]),
        (lambda text: text + "generation_batch_size = 30", ["grpo: ", "generation_batch_size=30", "num_generations=8"]),
        (lambda text: text + "top_p = 0.9", ["top_p=0.9", "set top_p=1"]),
    ],
)
def test_bad_files_name_file_key_and_fix(config_path, edit, words):
    config_path.write_text(edit(TOML))
    with pytest.raises(ConfigError) as caught:
        load_config(config_path)
    assert all(word in str(caught.value) for word in [str(config_path), *words]), str(caught.value)


def test_a_missing_file_names_the_nearest(config_path):
    with pytest.raises(ConfigError, match=r"no config file or run .*runn\.toml; did you mean .*run\.toml\?"):
        load_config(config_path.with_name("runn.toml"))


def test_a_run_directory_stands_for_its_settings(config_path, tmp_path):
    config = load_config(config_path, ["output_dir=elsewhere"])
    run = save_config(config, tmp_path / "run").parent
    assert load_config(run) == config.replace(output_dir=str(run))
    moved = run.rename(tmp_path / "moved")
    assert load_config(moved, ["grpo.beta=0.5"]).output_dir == str(moved)
    assert load_config(moved, ["grpo.beta=0.5"]).grpo.beta == 0.5
    with pytest.raises(ConfigError, match=r"has no config\.json: it is no run, or stopped"):
        load_config(tmp_path)


def test_errors_of_nested_settings_are_said_once():
    """Pydantic also reports the list that holds a bad item as too short."""
    with pytest.raises(ConfigError) as caught:
        RunConfig(output_dir="r", model={"name": "m"}, data={"train": "t"}, rewards=[{"name": "exact", "wait": 1}])
    assert str(caught.value) == "rewards.0.wait: unknown key; did you mean 'weight'?"
    with pytest.raises(ConfigError, match=r"^learning_rat: unknown key; did you mean 'learning_rate'\?$"):
        GRPOConfig(learning_rat=1)


ODD = [None, -1, 1.5, 10**30, "x", True, [], ["x"], [[1]], {"a": "b"}, float("inf"), float("nan"), b"x", object()]


@pytest.mark.parametrize("section", [*filter(None, SECTIONS)])
def test_every_odd_value_of_every_key_is_told_in_our_own_words(section):
    """Key, what it takes, and the value; one sentence, however many types a key may have."""
    needed = {name: "x" for name, field in section.model_fields.items() if field.is_required()}
    said = [(name, refusal(section, {**needed, name: value})) for name in section.model_fields for value in ODD]
    own = ("max_staleness=", "top_", "store_address=", "urls: 'x'")
    told = [(name, text) for name, text in said if text and not text.startswith(own)]
    assert len(told) > len(section.model_fields)
    assert [text for name, text in told if not re.fullmatch(rf"{name}: must be [^;]+ \(got .+\)", text)] == []


def refusal(section, values):
    try:
        section(**values)
    except ConfigError as error:
        return str(error)
    return None


def test_settings_that_were_built_say_how_to_change_them():
    with pytest.raises(ConfigError, match=r"^beta: settings cannot be changed; .* replace\(beta=0\.1\)$"):
        GRPOConfig().beta = 0.1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("max_steps", "set total_steps: it counts generations"),
        ("save_steps", "every version is published"),
        ("logging_steps", "every step is logged"),
        ("eval_steps", "set eval_every"),
        ("optim", "the optimizer is AdamW"),
        ("shuffle_dataset", "shuffled again in every epoch"),
        ("vllm_gpu_memory_utilization", "set engine.gpu_memory_utilization"),
    ],
)
def test_trls_names_get_an_answer_and_not_the_nearest_string(config_path, name, words):
    for refused in (lambda: GRPOConfig(**{name: 1}), lambda: load_config(config_path, [f"grpo.{name}=1"])):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert words in str(caught.value)
        assert "did you mean" not in str(caught.value)


def test_answers_are_for_names_that_are_not_ours_and_are_trls():
    assert not set(TRL_SETTINGS) & set(GRPOConfig.model_fields)
    trl = pytest.importorskip("trl")
    fields = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    former = {"warmup_ratio", "use_liger_loss"}
    assert set(TRL_SETTINGS) - former <= fields, set(TRL_SETTINGS) - fields
    assert fields <= {*TRL_SETTINGS, *GRPOConfig.model_fields}, "TRL's settings get an answer, never the nearest name"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("use_liger_loss", "log-probs take the vocabulary in parts; leave it out"),
        ("use_liger_kernel", "log-probs take the vocabulary in parts; leave it out"),
        ("remove_unused_columns", "reward functions get every column; leave it out"),
        ("ds3_gather_for_generation", "vLLM has a base of its own; leave it out"),
        ("sync_ref_model", "TRL does not move it with adapters either; leave it out"),
        ("torch_compile", "TRL's setting torch_compile has no counterpart here: leave it out"),
    ],
)
def test_trls_settings_get_no_nearest_name(name, words):
    with pytest.raises(ConfigError, match=f"{name}: unknown key; .*{words}") as caught:
        GRPOConfig(**{name: True})
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"scale_rewards": True}, {"scale_rewards": "group"}),
        ({"scale_rewards": False}, {"scale_rewards": "none"}),
        ({"report_to": "none"}, {"report_to": ()}),
        ({"report_to": ["none"]}, {"report_to": ()}),
        ({"report_to": None}, {"report_to": ()}),
        ({"report_to": "wandb"}, {"report_to": ("wandb",)}),
    ],
)
def test_trls_values_are_taken(given, taken):
    assert GRPOConfig(**given) == GRPOConfig(**taken)


def test_every_setting_is_explained_and_can_be_unset():
    """A default of None is the only None: JSON's null and an empty override then mean the same."""
    settings = list(describe_settings())
    assert all(setting.description for setting in settings), [s.key for s in settings if not s.description]
    keys = {setting.key: setting for setting in settings}
    assert keys["grpo.learning_rate"].default == "1e-06"
    assert keys["rewards.N.name"].default == "(needed)"
    assert keys["data.eval"].default == "-"
    assert keys["grpo.scale_rewards"].type == '"group" | "batch" | "none"'
