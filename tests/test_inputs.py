"""Files from other programs that are not JSON, or not the JSON that we expect."""

import pytest

from tfm_jax.errors import InputError
from tfm_jax.inputs import parse_json, read_json


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": ', "not JSON"),
        ("", "not JSON"),
        ('{"a": 1} x', "not JSON"),
        (b'{"a": "\xff"}', "not JSON .'utf-8' codec"),
        ('{"a": {"b": 1, "b": 2}}', "key 'b' is given twice"),
        ('{"a": NaN}', "'NaN' is not a finite number"),
        ('{"a": -Infinity}', "'-Infinity' is not a finite number"),
        ('{"a": 1e999}', "'1e999' is not a finite number"),
        ('{"a": 1%s}' % ("0" * 5000), "not JSON"),
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("[1]", "a JSON list; expected an object"),
        ("null", "a JSON NoneType; expected an object"),
        ('{"a": "%s"}' % ("b" * 200), "more than 200 bytes of JSON"),
    ],
)
def test_bad_json_is_one_line(tmp_path, text, words):
    limit = 200 if "more than" in words else 2**20
    with pytest.raises(InputError, match=f"^here: .*{words}") as caught:
        parse_json(text, "here", limit)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300

    file = tmp_path / "file.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"^{file}: "):
        read_json(file, limit)


def test_json_that_is_not_there_or_not_downloaded(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(InputError, match="no such file"):
        read_json(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(InputError, match="git-lfs pointer"):
        read_json(file)
    file.write_text('{"a": [1, 2.5, null, true]}')
    assert read_json(file) == {"a": [1, 2.5, None, True]}
