"""JSON that was cut, edited or is another file's: one line from one reader, wherever it is read."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dd2.errors import InputError
from dd2.evaluation.report import METRICS
from dd2.records import read_record
from edges import result_or_one_line

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1, "b": {"c": [1, 2.5]}}', ""),
        ('{"a": 1, "b": {}, "more": null}', ""),
        ("[1]", "it is no object"),
        ("{", "cannot be read"),
        ("", "cannot be read"),
        ('{"a": true, "b": {}}', "a is 'True', not of type int"),
        ('{"b": {}}', "a is missing"),
        ('{"a": 1, "b": {"c": 3}}', "b.c is no list"),
        ('{"a": 1, "b": {"c": [1, "x"]}}', "b.c[1] is 'x', not of type float"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_the_entry_that_is_wrong_is_named(tmp_path, content, said):
    file = tmp_path / "x.json"
    file.write_text(content)
    shape = {"a": int, "b": {"c?": [float]}}
    if not said:
        assert read_record(file, shape, "do this") == json.loads(content)
        return
    with pytest.raises(InputError) as refusal:
        read_record(file, shape, "do this")
    assert said in str(refusal.value)
    assert str(refusal.value).endswith("; do this")
    assert "\n" not in str(refusal.value)


@given(ANY_JSON, st.sampled_from(sorted(METRICS, key=str)))
def test_any_json_in_place_of_an_entry(tmp_path_factory, value, key):
    """Metrics of a run with any of their entries replaced give the record, or one line."""
    whole = {
        "methods": {"generator": "one step"},
        "metrics": {"generator": {"frechet": 1.0}},
        "distinct_sequences": {"generator": 3},
        "gap_closed": 0.5,
        "count": 10,
        "features": "digits",
        "seconds": {"csd": 3.0},
        "evaluation": {
            **dict.fromkeys(("count", "batch", "seed"), 1),
            **dict.fromkeys(("features", "prefix", "marginal"), "x"),
            "reference": {"reference": "teacher"},
        },
        "warnings": [],
    }
    file = tmp_path_factory.mktemp("r") / "metrics.json"
    file.write_text(json.dumps(whole))
    assert read_record(file, METRICS, "x") == whole
    file.write_text(json.dumps({**whole, key.removesuffix("?"): value}))
    with result_or_one_line(file.name):
        read_record(file, METRICS, "x")


@given(st.binary(max_size=100))
def test_any_bytes_are_a_record_or_one_line(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("r") / "x.json"
    file.write_bytes(content)
    with result_or_one_line(file.name):
        assert isinstance(read_record(file, {}, "x"), dict)
