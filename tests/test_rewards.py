"""Rewards: TRL's signature, what is refused, and the ready-made ones."""

import asyncio
import functools
import math
import threading
import urllib.request

import numpy as np
import pytest

from lora_grpo.config import RewardConfig
from lora_grpo.errors import ConfigError, RewardError
from lora_grpo.grpo_config import GRPOConfig
from lora_grpo.rewards import (
    RewardContext,
    check_columns,
    completion_text,
    exact,
    format,
    load_reward,
    numeric,
    regex,
    reward_names,
    score,
)
from lora_grpo.types import Completion, Group

CHAT = [{"role": "user", "content": "3+3"}]


def group(prompt, *texts):
    done = tuple(Completion(text, (len(text), 7), (-0.1, -0.2), "stop", 1) for text in texts)
    return Group(prompt, (1, 2), done)


GROUPS = [group("1+1=", "2", "3"), group("2+2=", "4", "5")]


def length(completions, **kwargs):
    return [len(text) for text in completions]


def test_functions_get_trl_inputs_with_columns_repeated_for_each_completion():
    seen = {}

    def spy(prompts, completions, completion_ids, answer, trainer_state, **kwargs):
        seen.update(locals())
        return [0.0] * 4

    context = RewardContext(global_step=5, max_steps=9)
    score([spy], GROUPS, {"answer": [2, 4], "tag": ["a", "b"]}, context)
    assert seen["prompts"] == ["1+1=", "1+1=", "2+2=", "2+2="]
    assert seen["completions"] == ["2", "3", "4", "5"]
    assert seen["completion_ids"] == [[1, 7]] * 4
    assert seen["answer"] == [2, 2, 4, 4]
    assert seen["kwargs"]["tag"] == ["a", "a", "b", "b"]
    assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (5, 9)


def test_what_a_function_does_to_its_lists_is_seen_by_no_other():
    def empties(prompts, completions, **columns):
        rewards = length(completions)
        completions.clear()
        prompts.sort(reverse=True)
        return rewards

    assert score([empties, length], GROUPS, {}) == [[1.0, 1.0]] * 4


def test_chat_prompts_get_message_lists():
    seen = []

    def spy(completions, **kwargs):
        seen.extend(completions)
        return [1.0]

    score([spy], [group(CHAT, "6")], {})
    assert seen == [[{"role": "assistant", "content": "6"}]]
    assert completion_text(seen[0]) == completion_text("6") == "6"


def test_rows_hold_one_value_a_function_and_none_is_nan():
    def half(completions, **kwargs):
        return [None, np.float32(0.5), True, np.int64(3)]

    rewards_BF = score([length, half], GROUPS, {})
    assert [row[0] for row in rewards_BF] == [1.0] * 4
    assert math.isnan(rewards_BF[0][1])
    assert [row[1] for row in rewards_BF[1:]] == [0.5, 1.0, 3.0]
    assert score([lambda completions: np.arange(4)], GROUPS, {})[3] == [3.0]


def test_async_functions_run_at_the_same_time_also_inside_a_running_loop():
    """Each waits for the other: run one after the other, they would never end."""
    left, right = threading.Event(), threading.Event()

    async def wait_for(mine, other):
        mine.set()
        while not other.is_set():
            await asyncio.sleep(0)

    async def first(completions, **kwargs):
        await wait_for(left, right)
        return [1.0] * len(completions)

    async def second(completions, **kwargs):
        await wait_for(right, left)
        return [2.0] * len(completions)

    async def in_a_notebook():
        return score([first, second, functools.partial(second)], GROUPS, {})

    assert asyncio.run(in_a_notebook()) == [[1.0, 2.0, 2.0]] * 4


def test_async_functions_share_one_loop_between_steps():
    """A client bound to the loop of the first step must still work in the second."""
    loops = []

    async def judge(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    score([judge], GROUPS, {})
    score([judge], GROUPS, {})
    assert loops[0] is loops[1]


@pytest.mark.parametrize("is_async", [False, True])
def test_an_exception_names_function_prompt_and_completion(is_async):
    def divide(completions, **kwargs):
        return [1 / (int(text) - 4) for text in completions]

    async def divide_later(completions, **kwargs):
        return divide(completions)

    with pytest.raises(RewardError) as caught:
        score([length, divide_later if is_async else divide], GROUPS, {})
    said = str(caught.value)
    assert "'divide_later'" in said if is_async else "'divide'" in said
    assert "ZeroDivisionError" in said
    assert "prompt '2+2=', completion '4'" in said
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_that_no_single_row_repeats_says_so():
    def whole(completions, **kwargs):
        if len(completions) > 1:
            raise KeyError("batch")
        return [0.0]

    with pytest.raises(RewardError, match=r"for all 4 rows together.*; the first is row 0: prompt '1\+1='"):
        score([whole], GROUPS, {})


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0, 2.0], "returned 2 values for 4 completions"),
        (None, "returned None; it must return a list of 4 numbers"),
        ("1234", "must return a list"),
        ([0, 0, "0.5", 0], "returned '0.5' for row 2: prompt '2+2=', completion '4'; return a number"),
        ([0, math.inf, 0, 0], "returned inf for row 1: prompt '1+1=', completion '3'"),
        ([math.nan, 0, 0, 0], "or None where the reward does not apply"),
        ([0, 0, 1e308, 0], "returned 1e+308 for row 2: prompt '2+2=', completion '4'; float32 ends at 3.4e+38"),
        ([0, -(10**400), 0, 0], "float32 ends at 3.4e+38: scale it down"),
    ],
)
def test_bad_results_are_refused(returned, words):
    with pytest.raises(RewardError) as caught:
        score([lambda completions: returned], GROUPS, {})
    assert words in str(caught.value)


@pytest.mark.parametrize(("rows", "most"), [(1, 0), (2, 2), (6, 4), (16, 5), (512, 10)])
@pytest.mark.parametrize("where", [0.0, 0.4, 1.0])
def test_a_failing_row_is_found_by_halving(rows, most, where):
    """512 rows took 512 more calls of what may be a paid service."""
    bad, calls = f"t{int(where * (rows - 1))}", []

    def judge(completions, **kwargs):
        calls.append(len(completions))
        return [1 / (text != bad) for text in completions]

    with pytest.raises(RewardError, match=rf"ZeroDivisionError.* for row .*completion '{bad}'$"):
        score([judge], [group("q", *(f"t{index}" for index in range(rows)))], {})
    assert len(calls) - 1 <= most


def test_a_search_that_finds_nothing_ends_as_soon():
    calls = []

    def judge(completions, **kwargs):
        calls.append(len(completions))
        if len(completions) == 512:
            raise KeyError("batch")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="for all 512 rows together"):
        score([judge], [group("q", *["a"] * 512)], {})
    assert len(calls) - 1 <= 10


def refused_by(library):
    """A judge whose server is not there, as `library` says it."""
    address = "127.0.0.1:1"

    def judge(completions, **kwargs):
        match library:
            case "builtin":
                raise TimeoutError("judge")
            case "urllib":
                urllib.request.urlopen(f"http://{address}")
            case "requests":
                pytest.importorskip("requests").get(f"http://{address}")
            case "httpx":
                pytest.importorskip("httpx").get(f"http://{address}")
            case "openai":
                openai = pytest.importorskip("openai")
                openai.OpenAI(base_url=f"http://{address}", api_key="k", max_retries=0).models.list()
            case "wrapped":
                try:
                    raise ConnectionResetError
                except ConnectionResetError as error:
                    raise RuntimeError("the judge is gone") from error

    return judge


@pytest.mark.parametrize("library", ["builtin", "urllib", "requests", "httpx", "openai", "wrapped"])
def test_a_judge_that_is_not_reached_is_called_again_and_no_row_is_blamed(library, monkeypatch, caplog):
    pauses, calls, judge = [], [], refused_by(library)
    monkeypatch.setattr("lora_grpo.rewards.call.time.sleep", pauses.append)

    def counted(completions, **kwargs):
        calls.append(len(completions))
        judge(completions)

    with pytest.raises(RewardError, match=r"'counted' raised .* in each of 4 calls of the whole batch") as caught:
        score([counted], GROUPS, {}, config=GRPOConfig(reward_retries=3))
    assert calls == [4] * 4
    assert pauses == [1.0, 2.0, 4.0]
    assert "row" not in str(caught.value)
    assert caplog.text.count("it is called again in") == 3


def test_what_goes_wrong_while_a_timeout_is_handled_is_not_the_timeout():
    """Its row is found, and nothing is called again in vain."""
    calls = []

    def judge(completions, **kwargs):
        calls.append(len(completions))
        try:
            raise TimeoutError("judge")
        except TimeoutError:
            return [{"a": 1.0}[text] for text in completions]

    where = r"\(.*test_rewards\.py, line \d+\) for row 2: .* completion 'b'"
    with pytest.raises(RewardError, match=rf"raised KeyError: 'b' {where}"):
        score([judge], [group("q", "a", "a", "b", "a")], {})
    assert calls.count(4) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_one_timeout_does_not_end_a_run(is_async, monkeypatch):
    """By default one more call is made, and what the first one logged does not count."""
    monkeypatch.setattr("lora_grpo.rewards.call.time.sleep", lambda seconds: None)
    failures = [TimeoutError("judge")]

    def judge(completions, log_metric, **kwargs):
        log_metric("calls", 5.0 if failures else 1.0)
        if failures:
            raise failures.pop()
        return [0.5] * len(completions)

    async def judge_later(completions, log_metric, **kwargs):
        return judge(completions, log_metric)

    context = RewardContext()
    assert score([length, judge_later if is_async else judge], GROUPS, {}, context) == [[1.0, 0.5]] * 4
    assert context.metrics() == {"calls": 1.0}
    failures.append(TimeoutError("judge"))
    with pytest.raises(RewardError, match="TimeoutError: judge in each of 1 calls"):
        score([judge], GROUPS, {}, config=GRPOConfig(reward_retries=0))


@pytest.mark.parametrize("is_async", [False, True])
def test_a_judge_that_never_answers_is_given_up(is_async, monkeypatch):
    monkeypatch.setattr("lora_grpo.rewards.call.time.sleep", lambda seconds: None)
    let_go, calls = threading.Event(), []

    def judge(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 1:
            let_go.wait()
        return [0.5] * len(completions)

    async def judge_later(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 1:
            await asyncio.Event().wait()
        return [0.5] * len(completions)

    function = judge_later if is_async else judge
    try:
        assert score([function], GROUPS, {}, config=GRPOConfig(reward_timeout_s=0.2)) == [[0.5]] * 4
        assert calls == [4, 4]
        calls.clear()
        with pytest.raises(RewardError, match=r"no answer within reward_timeout_s=0\.2 in each of 1 calls"):
            score([function], GROUPS, {}, config=GRPOConfig(reward_retries=0, reward_timeout_s=0.2))
    finally:
        let_go.set()


def test_rows_that_nothing_scored_are_said_and_kept_as_nan(caplog):
    rewards_BF = score([lambda completions: [None, 1, 1, 1]], GROUPS, {})
    assert math.isnan(rewards_BF[0][0])
    assert "no reward function scored 1 of 4" in caplog.text


def test_what_functions_log_is_kept():
    def chatty(completions, log_extra, log_metric, **kwargs):
        log_extra("seen", [text * 2 for text in completions])
        log_metric("strictness", 1.0)
        log_metric("strictness", 0.0)
        return [0.0] * len(completions)

    context = RewardContext()
    score([chatty], GROUPS, {}, context)
    assert context.extra == {"seen": ["22", "33", "44", "55"]}
    assert context.metrics() == {"strictness": 0.5}


def test_columns_that_are_logged_have_a_value_a_completion():
    def short(completions, log_extra):
        log_extra("seen", ["one"])
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'short' logged 1 value of 'seen' for 4 completions"):
        score([short], GROUPS, {})


def test_a_missing_column_is_refused_before_the_first_step():
    def strict(completions, solution, **kwargs):
        return []

    with pytest.raises(ConfigError, match=r"'strict' asks for column 'solution'.*\['answer'\]"):
        check_columns([length, strict], ["answer"])
    with pytest.raises(ConfigError, match=r"'exact' asks for column 'gold'"):
        check_columns([exact(column="gold")], ["answer"])
    check_columns([length, exact(), lambda completions, extra=None: []], ["answer"])
    with pytest.raises(ConfigError, match="column 'answer' has 1 value for 2 prompts"):
        score([length], GROUPS, {"answer": [1]})


def test_names_are_distinct():
    assert reward_names([regex("a"), length, regex("b"), functools.partial(length)]) == [
        "regex",
        "length",
        "regex_2",
        "length_2",
    ]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("so the total is 1,200 dollars.", "#### 1200", 1.0),
        ("3 apples and 4 pears make 7.", "3 + 4 = <<3+4=7>>7\n#### 7", 1.0),
        ("#### 12\nLet me check: 5", "12", 1.0),
        ("the answer is -5", "-5", 1.0),
        ("10-5", "5", 1.0),
        ("-$40", "-40", 1.0),
        ("0.50", 0.5, 1.0),
        ("it is .5", "0.5", 1.0),
        ("\u221217", "-17", 1.0),
        ("the list 1,2,3", "3", 1.0),
        ("1e3", "1000", 1.0),
        ("1e99999999999999999999", "5", 0.0),
        ("75 ", "750", 0.0),
        ("no idea", "4", 0.0),
        ("1" * 5000, "1" * 4999 + "2", 0.0),
    ],
)
def test_numeric(completion, answer, reward):
    assert numeric()([completion], answer=[answer]) == [reward]


def test_numeric_tolerance_and_an_answer_without_a_number():
    assert numeric(tolerance=0.01)(["3.14", "3.2"], answer=["3.1416", "3.1416"]) == [1.0, 0.0]
    with pytest.raises(RewardError, match=r"column 'answer' holds 'none', which contains no number"):
        score([numeric()], [group("q", "1")], {"answer": ["none"]})
    with pytest.raises(ConfigError, match="tolerance=-1"):
        numeric(tolerance=-1)


def test_exact_regex_and_format():
    assert exact()([" 075\n", "75"], answer=["075", "075"]) == [1.0, 0.0]
    assert exact()(["None", "1"], answer=[None, "1"]) == [None, 1.0]
    assert numeric()(["0", "1"], answer=[None, 1]) == [None, 1.0]
    assert exact(ignore_case=True)(["Paris"], answer=["PARIS "]) == [1.0]
    assert regex(r"\bgood\b")(["all good.", "goods", [{"role": "assistant", "content": "good"}]]) == [1.0, 0.0, 1.0]
    shaped = format()
    assert shaped(["<think>\na\n</think>\n<answer>4</answer>\n", "<answer>4</answer>"]) == [1.0, 0.0]


def test_load_reward_by_name_and_by_import(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions, limit=3, **kwargs):\n    return [float(len(c) <= limit) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    ready = load_reward(RewardConfig(name="regex", options={"pattern": "^4$"}))
    assert score([ready], GROUPS, {})[2] == [1.0]
    own = load_reward(RewardConfig(name="my_rewards:short", options={"limit": 0}))
    assert score([own], GROUPS, {}) == [[0.0]] * 4
    assert reward_names([own]) == ["short"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(completions:\n", ["SyntaxError: '(' was never closed (broken.py, line 1)"]),
        ("import math\nlimit = math.sqart(4)\n", ["AttributeError: module 'math' has no", "broken.py, line 2)"]),
    ],
)
def test_a_rewards_file_that_cannot_be_imported_is_one_sentence(tmp_path, monkeypatch, source, words):
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^reward 'broken:f': importing 'broken' raised ") as caught:
        load_reward(RewardConfig(name="broken:f"))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "numerc"}, ["'numerc'", "did you mean 'numeric'?", "package.module:function"]),
        ({"name": "no_such_module:f"}, ["No module named 'no_such_module'", "current directory"]),
        ({"name": "math:sqart"}, ["math has no 'sqart'", "'sqrt'"]),
        ({"name": "math:pi"}, ["no function"]),
        ({"name": "numeric", "options": {"tolerence": 1}}, ["'tolerence'", "'tolerance'"]),
        ({"name": "regex"}, ["missing a required argument: 'pattern'", "as options.NAME = "]),
        ({"name": "regex", "options": {"pattern": "("}}, ["pattern '('", "not a regular expression"]),
    ],
)
def test_bad_reward_settings_name_the_fix(config, words):
    with pytest.raises(ConfigError) as caught:
        load_reward(RewardConfig(**config))
    assert all(word in str(caught.value) for word in words), str(caught.value)
