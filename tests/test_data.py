"""Prompts: reading, checking, and an order that resumes exactly."""

import json
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_grpo.config import DataConfig
from lora_grpo.data import PromptSampler, load_data, load_prompts
from lora_grpo.errors import ConfigError

ROWS = [{"prompt": "1+1=", "answer": 2, "tag": "easy"}, {"prompt": "17+58=", "answer": "75", "tag": "carry"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_keeps_prompts_and_columns_of_mixed_types(tmp_path):
    """Arrow would refuse an answer column that is a number in one row and text in the next."""
    data = load_prompts(write_jsonl(tmp_path / "train.jsonl", ROWS))
    assert len(data) == 2
    assert data.column_names == ("answer", "tag")
    assert data.select([1, 0, 1]) == (
        ["17+58=", "1+1=", "17+58="],
        {"answer": ["75", 2, "75"], "tag": ["carry", "easy", "carry"]},
    )


def test_csv_is_rows_of_text(tmp_path):
    (tmp_path / "train.csv").write_bytes(
        b'\xef\xbb\xbfprompt,answer\r\n"Say ""a, b""\nand stop.",2\r\n\r\n17+58=,75\r\n'
    )
    data = load_prompts(tmp_path / "train.csv")
    assert data.select([0, 1]) == (['Say "a, b"\nand stop.', "17+58="], {"answer": ["2", "75"]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,answer\n1+1=,2\n1,000+1=,1001\n", r"line 3: 3 values for 2 columns; put a value that holds a comma"),
        ("prompt,prompt\na,b\n", r"the first line must name each column once; it is \['prompt', 'prompt'\]"),
        ('prompt,answer\n"1+1=,2\n', r"not CSV: unexpected end of data"),
        ("prompt;answer\n1+1=;2\n", r"its columns lie between ';'; put commas there"),
    ],
)
def test_csv_that_cannot_be_read_is_named(tmp_path, text, words):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ConfigError, match=rf"bad\.csv.*{words}"):
        load_prompts(tmp_path / "bad.csv")


def test_a_csv_field_may_be_long(tmp_path):
    (tmp_path / "long.csv").write_text(f"prompt,answer\n{'9+' * 100_000},4\n")
    assert len(load_prompts(tmp_path / "long.csv").select([0])[0][0]) == 200_000


def test_a_saved_dataset_is_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert load_prompts(tmp_path / "saved").select([0, 1]) == load_prompts(rows).select([0, 1])
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ConfigError, match=r"saved is no complete folder of Dataset\.save_to_disk"):
        load_prompts(tmp_path / "saved")


def test_files_without_rows_say_so(tmp_path, monkeypatch):
    """And a Parquet file of which only the first group has none is read."""
    datasets = pytest.importorskip("datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    none = arrow.table({"prompt": arrow.array([], arrow.string())})
    parquet.write_table(none, tmp_path / "empty.parquet")
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(str(tmp_path / "saved"))
    for name in ("empty.parquet", "saved"):
        with pytest.raises(ConfigError, match=rf"{name} has no rows$"):
            load_prompts(tmp_path / name)
    with parquet.ParquetWriter(tmp_path / "some.parquet", none.schema) as file:
        file.write_table(none)
        file.write_table(arrow.table({"prompt": ["1+1="]}))
    assert load_prompts(tmp_path / "some.parquet").select([0])[0] == ["1+1="]


def test_every_source_gives_the_same_prompts(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"{n}+1=", "answer": n + 1} for n in range(5)]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "t.parquet"))
    (tmp_path / "array.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "t.jsonl", rows)
    sources = [rows, table, tmp_path / "t.parquet", str(tmp_path / "t.jsonl"), tmp_path / "array.json"]
    read = [load_prompts(source, prompt_column="question") for source in sources]
    first = read[0].select([3, 1])
    assert first == (["3+1=", "1+1="], {"answer": [4, 2]})
    assert all(data.select([3, 1]) == first for data in read)
    assert all(len(load_prompts(source, prompt_column="question", limit=2)) == 2 for source in sources)


def test_chats_from_arrow_lose_the_keys_of_other_messages(tmp_path, monkeypatch):
    """Arrow gives each message the union of keys, with None; a chat template would render `tool_calls: None`."""
    datasets = pytest.importorskip("datasets")
    chat = [{"role": "user", "content": "hi"}]
    other = [{"role": "user", "content": "a", "name": "Bo"}]
    data = load_prompts(datasets.Dataset.from_list([{"messages": chat}, {"messages": other}]), prompt_column="messages")
    assert data.select([0])[0][0] == chat
    assert data.select([1])[0][0] == other


def test_system_prompt_makes_chats():
    text, chat = {"prompt": "2+2"}, {"prompt": [{"role": "user", "content": "3+3"}]}
    user = {"role": "user", "content": "2+2"}
    system = {"role": "system", "content": "Be brief."}
    assert load_prompts([text]).select([0])[0][0] == "2+2"
    assert load_prompts([text], system_prompt="Be brief.").select([0])[0][0] == [system, user]
    assert load_prompts([text], system_prompt="").select([0])[0][0] == [user]
    assert load_prompts([chat], system_prompt="Be brief.").select([0])[0][0] == [system, *chat["prompt"]]


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"question": "a", "x": 1}], {}, ["'prompt'", "'question', 'x'", "prompt_column"]),
        ([{"messages": [], "x": 1}], {}, ["its columns are 'messages', 'x': name one in prompt_column"]),
        ([{"prompt": "a"}, {"prompt": ""}], {}, ["row 1", "'prompt'", "empty"]),
        ([{"prompt": "a"}, {"prompt": " \t "}], {}, ["row 1", "'prompt'", "empty"]),
        ([{"prompt": "a"}, {"x": 1}], {}, ["row 1", "None", "a prompt is text or a list"]),
        ([{"prompt": 17}], {}, ["row 0", "17"]),
        ([{"prompt": [{"content": "no role"}]}], {}, ["row 0", "'role'"]),
        ([{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}], {}, ["leave out"]),
        ([{"prompt": [{"role": "system", "content": "s"}]}], {"system_prompt": "t"}, ["data.system_prompt"]),
        ([{"prompt": "a\ud800"}], {}, ["row 0", r"'\ud800'", "replace"]),
        ([{"prompt": [{"role": "user", "content": "a\udfff"}]}], {}, ["row 0", r"'\udfff'"]),
        ([{"prompt": "a", "completions": 1}], {}, ["'completions'", "rename"]),
        ([], {}, ["no rows"]),
        (["text"], {}, ["row 0", "'text'", "dict"]),
        ({"train": [], "test": []}, {}, ["'train', 'test'"]),
    ],
)
def test_bad_rows_are_refused_with_the_fix(rows, options, words):
    with pytest.raises(ConfigError) as caught:
        load_prompts(rows, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_bad_files_name_file_and_line(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(
        ConfigError, match=r"broken\.jsonl, line 3: JSON that cannot be read: Expecting value at column 12"
    ):
        load_prompts(broken)
    broken.write_text('{"prompt": "a"}\n[1]\n')
    with pytest.raises(ConfigError, match=r"line 2: \[1\] is no JSON object"):
        load_prompts(broken)
    for text, words in (
        ("[" * 100_000, ": JSON that cannot be read: maximum recursion depth"),
        ('{"prompt": %s}' % ("9" * 5000), "line 1: JSON that cannot be read: Exceeds the limit"),
        (json.dumps({"prompt": "a"}, indent=1), "one object a line, or one array of objects"),
    ):
        broken.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_prompts(broken)
    (tmp_path / "rows.tsv").write_text("prompt\n1+1=\n")
    with pytest.raises(
        ConfigError, match=r"rows\.tsv is a file of a kind that is not read here; for a local file give"
    ):
        load_prompts(tmp_path / "rows.tsv")
    with pytest.raises(ConfigError, match=r"no such data file: .*nowhere\.jsonl"):
        load_prompts("nowhere.jsonl")
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(ConfigError, match=r"bad\.parquet is not a readable Parquet file"):
        load_prompts(tmp_path / "bad.parquet")


def test_a_byte_order_mark_is_no_content_and_other_encodings_are_told(tmp_path):
    """As Windows programs write it."""
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "1+1="}\n')
    assert load_prompts(marked).select([0])[0][0] == "1+1="
    marked.write_text('{"prompt": "\u00e9"}', encoding="latin-1")
    with pytest.raises(ConfigError, match=r"marked\.jsonl is not UTF-8"):
        load_prompts(marked)


def test_rows_without_an_end_are_refused():
    datasets = pytest.importorskip("datasets")
    endless = datasets.IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))
    for source in (endless, iter(ROWS)):
        with pytest.raises(ConfigError, match="cannot be counted"):
            load_prompts(source)


def test_load_data_reads_both_sets(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", ROWS)
    held_out = write_jsonl(tmp_path / "eval.jsonl", ROWS * 3)
    trained, evaluated = load_data(DataConfig(train=str(train), eval=str(held_out), eval_limit=4))
    assert (len(trained), len(evaluated)) == (2, 4)
    assert load_data(DataConfig(train=str(train)))[1] is None


@given(n=st.integers(1, 40), p=st.integers(1, 50), seed=st.integers(0, 2**40), before=st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_sampler_resumes_exactly_and_epochs_are_permutations(n, p, seed, before):
    whole = list(islice(PromptSampler(n, p, seed), before + 6))
    first = PromptSampler(n, p, seed)
    head = list(islice(first, before))
    resumed = PromptSampler(n, p, seed)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + list(islice(resumed, 6)) == whole
    drawn = [index for step in whole for index in step]
    for start in range(0, len(drawn) - n + 1, n):
        assert sorted(drawn[start : start + n]) == list(range(n))


def test_sampler_order_is_fixed_for_ever_and_depends_on_seed_and_epoch():
    """A resumed run of another NumPy release must go on in the same order: these numbers never change."""
    sampler = PromptSampler(8, 8, seed=42)
    epochs = list(islice(sampler, 3))
    assert epochs[0] == FIXED_ORDER
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert next(PromptSampler(8, 8, seed=43)) != epochs[0]
    assert (sampler.epoch, sampler.offset) == (3, 0)


FIXED_ORDER = [7, 3, 4, 6, 5, 2, 1, 0]


def test_sampler_refuses_the_state_of_another_run():
    state = PromptSampler(10, 2, seed=1).state_dict()
    with pytest.raises(ConfigError, match=r"\(10, 1\), now it is \(11, 1\)"):
        PromptSampler(11, 2, seed=1).load_state_dict(state)
