"""The tokenizer and the encoding of prompts, against diffusers' pipeline; damaged tokenizers are refused."""

import json
import os
import shutil
import sys
import unicodedata

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from helpers.umt5_reference import diffusers_tensors, from_state_dict, reference_encoder
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5TokenizerFast

from tfm_jax.arrays import pad_text
from tfm_jax.errors import InputError
from tfm_jax.moving_shapes.tokenizer import write_tokenizer
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.tokenizer import Tokenizer, clean_prompt, encode_prompts

TOKENS, SETTINGS = "tokenizer.json", "tokenizer_config.json"
CORPUS = [
    "A red circle moves left across a dark background, slowly and without a sound.",
    "A blue square moves right, then up & down; the camera follows the square.",
    "Two green triangles turn around a yellow circle. The background turns dark.",
    "一只橘猫在雪地里奔跑，镜头缓慢推进。一只白狗在草地里奔跑。",
    "café, naïve <movie> “quoted” 🙂 🎬",
]
PROMPTS = {
    "english": "A red circle moves left, slowly.",
    "chinese": "一只白猫在雪地里奔跑，镜头缓慢推进。",
    "emoji": "the camera 🎬 follows 🙂 a dog 🐕‍🦺",
    "entities": "up &amp;lt;b&amp;gt; &amp; down &quot;dark&quot; &#39;x&#39;&nbsp;&hellip;",
    "entities beside markup": "<b> a &amp;amp;lt; b &amp;lt;i&amp;gt; c &amp;amp; d",
    "empty": "",
    "white space": " \t\n a\u3000red \r\n\r\n circle\u00a0 moves \u2028 left\n",
    "only white space": " \n\t\u3000 ",
    "mojibake": "cafÃ© â€œquotedâ€\x9d naÃ¯ve",
    "wide letters": "Ａ ｒｅｄ ﬁlm",
    "special tokens": "a <pad> red </s> circle <unk> <extra_id_0>",
    "unknown": "Ω≈ç√ ∫ 𓀀",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_tokenizer(path / "tokenizer", CORPUS, 200)
    return path


@pytest.fixture(scope="module")
def config(directory):
    vocab_size = len(AutoTokenizer.from_pretrained(directory / "tokenizer")) + 7
    return TextEncoderConfig(vocab_size=vocab_size, dim=24, heads=2, head_dim=8, ffn_dim=32, layers=2)


@pytest.fixture(scope="module")
def pipeline(directory, config):
    tokenizer = T5TokenizerFast.from_pretrained(directory / "tokenizer")
    return WanPipeline(tokenizer=tokenizer, text_encoder=reference_encoder(config), vae=None, scheduler=None)


@pytest.fixture(scope="module")
def encoder(config, pipeline):
    return from_state_dict(config, diffusers_tensors(pipeline.text_encoder), "diffusers")


def run_pipeline(pipeline, prompts, length=512):
    """The ids and mask that diffusers gives its text encoder, and the embeddings that it passes on."""
    seen = []
    hook = pipeline.text_encoder.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    embeddings = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=length, device=torch.device("cpu"))
    hook.remove()
    ids, mask = seen
    return ids.numpy(), mask.numpy(), embeddings.numpy()


@pytest.mark.parametrize("name", PROMPTS)
def test_clean_prompt(name):
    assert clean_prompt(PROMPTS[name]) == prompt_clean(PROMPTS[name])


def test_clean_prompt_at_every_space_and_control():
    special = [
        c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp")
    ]
    assert len(special) > 200
    for c in special:
        for text in (f"a{c}{c}b{c}", f"a &#{ord(c)}; b&amp;#{ord(c)};"):
            assert clean_prompt(text) == prompt_clean(text), repr(c)


def test_ids_equal_the_pipeline(directory, pipeline):
    ids, mask = Tokenizer(directory)(list(PROMPTS.values()))
    expected_ids, expected_mask, _ = run_pipeline(pipeline, list(PROMPTS.values()))
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(mask, expected_mask)
    assert ids.shape == (len(PROMPTS), 512)
    assert ids.dtype == mask.dtype == np.int32
    assert len({row.tobytes() for row in ids}) == len(PROMPTS) - 1, "only the two empty prompts are alike"
    empty = list(PROMPTS).index("empty")
    assert ids[empty, :2].tolist() == [1, 0]
    assert mask[empty].sum() == 1


def test_long_prompt_is_cut_with_a_warning(directory, pipeline):
    prompts = ["a red circle moves left &amp;amp; ", "dark " * 600, "一只猫" * 300]
    with pytest.warns(UserWarning, match="cut to 512") as caught:
        ids, mask = Tokenizer(directory)(prompts)
    assert len(caught) == 2
    assert all("\n" not in str(warning.message) for warning in caught)
    expected_ids, expected_mask, _ = run_pipeline(pipeline, prompts)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(mask, expected_mask)
    assert ids[1:, -1].tolist() == [1, 1]
    whole = len(AutoTokenizer.from_pretrained(directory / "tokenizer")(("dark " * 600).strip()).input_ids)
    assert f"{whole} tokens cut to 512, {whole - 512} dropped" in str(caught[0].message)


def test_exact_fit_does_not_warn(directory, recwarn):
    tokenizer = Tokenizer(directory)
    length = int(tokenizer(["a red circle"])[1].sum())
    ids, mask = tokenizer(["a red circle"], length=length)
    assert mask.all()
    assert ids[0, -1] == 1
    assert not [warning for warning in recwarn if "cut to" in str(warning.message)]


def test_encode_prompts_equals_the_pipeline(directory, pipeline, encoder):
    prompts = list(PROMPTS.values())
    _, mask, expected = run_pipeline(pipeline, prompts)
    embeddings = encode_prompts(Tokenizer(directory), encoder, prompts)
    assert [embedding.shape for embedding in embeddings] == [(length, 24) for length in mask.sum(1)]
    result = pad_text(embeddings, 512)
    assert result.shape == (len(prompts), 512, 24)
    assert np.abs(result - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.all(result[mask == 0] == 0)


def test_encode_prompts_keeps_bfloat16(directory, config, pipeline):
    encoder = from_state_dict(config, diffusers_tensors(pipeline.text_encoder), "diffusers", jnp.bfloat16)
    embeddings = encode_prompts(Tokenizer(directory), encoder, ["a red circle"])
    assert embeddings[0].dtype == pad_text(embeddings, 512).dtype == jnp.bfloat16


def test_tokenizer_of_another_model_is_refused(directory, pipeline):
    config = TextEncoderConfig(vocab_size=20, dim=8, heads=1, head_dim=8, ffn_dim=8, layers=1)
    encoder = from_state_dict(config, diffusers_tensors(reference_encoder(config)), "diffusers")
    with pytest.raises(InputError, match="expected less than 20"):
        encode_prompts(Tokenizer(directory), encoder, ["A red circle"])


def test_both_places(directory, tmp_path):
    write_tokenizer(tmp_path / "google/umt5-xxl", CORPUS, 200)
    prompts = list(PROMPTS.values())
    np.testing.assert_array_equal(Tokenizer(tmp_path)(prompts)[0], Tokenizer(directory)(prompts)[0])


def test_missing_tokenizer_names_both_places(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(InputError) as error:
        Tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer/tokenizer.json") in str(error.value)
    assert str(tmp_path / "google/umt5-xxl/tokenizer.json") in str(error.value)
    assert "\n" not in str(error.value)


def changed(name, **fields):
    """Set fields of a JSON file; None removes a field."""

    def change(folder):
        values = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return change


def replaced(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: os.truncate(folder / TOKENS, 3000), f"{TOKENS}: not JSON"),
        (replaced(TOKENS, ""), f"{TOKENS}: is empty"),
        (replaced(TOKENS, "version https://git-lfs.github.com/spec/v1"), f"{TOKENS}: is a git-lfs pointer"),
        (replaced(TOKENS, "<!DOCTYPE html>"), f"{TOKENS}: is an HTML page"),
        (replaced(TOKENS, '{"a":' * 100_000), f"{TOKENS}: JSON nested too deep"),
        (replaced(TOKENS, "{}"), "tokenizer: not a tokenizer"),
        (changed(TOKENS, model={}), "tokenizer: not a tokenizer"),
        (changed(TOKENS, post_processor=None), r"an empty prompt, .* becomes \[0, 0, 0\]; expected \[1, 0, 0\]"),
        (replaced(SETTINGS, ""), f"{SETTINGS}: is empty"),
        (replaced(SETTINGS, "[]"), f"{SETTINGS}: a JSON list"),
        (replaced(SETTINGS, "{}"), f"{SETTINGS}: pad_token is missing"),
        (lambda folder: (folder / SETTINGS).unlink(), f"{SETTINGS}: pad_token is missing"),
        (changed(SETTINGS, pad_token=None), f"{SETTINGS}: pad_token is missing"),
        (changed(SETTINGS, eos_token=None), f"{SETTINGS}: eos_token is missing"),
        (changed(SETTINGS, pad_token=5), "tokenizer: not a tokenizer"),
        (changed(SETTINGS, pad_token="<other>"), r"an empty prompt, .* becomes \[1, [0-9]+, [0-9]+\]; expected"),
        (changed(SETTINGS, padding_side="left"), r"an empty prompt, .* becomes \[0, 0, 1\]; expected"),
        (changed(SETTINGS, model_max_length="x"), "tokenizer: not a tokenizer"),
        (replaced("special_tokens_map.json", "["), r"special_tokens_map\.json: not JSON"),
        (replaced("added_tokens.json", "[1]"), r"added_tokens\.json: a JSON list"),
    ],
)
def test_damaged_files(directory, tmp_path, change, words):
    shutil.copytree(directory, tmp_path / "model")
    change(tmp_path / "model" / "tokenizer")
    with pytest.raises(InputError, match=words) as caught:
        Tokenizer(tmp_path / "model")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/model/tokenizer")
    assert "\n" not in message


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_reads_the_file_as_it_stands(tmp_path, byte_fallback):
    """In the files of umT5, <s> has id 2, <unk> has 3, and the single bytes follow; they name the class T5Tokenizer."""
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    pieces = [(token, 0.0) for token in special] + [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [("▁", -2.0), ("▁dog", -3.0), ("狗", -4.0)]
    backend = Backend(models.Unigram(pieces, unk_id=3, byte_fallback=byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.post_processor = T5TokenizerFast()._tokenizer.post_processor
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path / "tokenizer")
    settings = tmp_path / "tokenizer/tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "T5Tokenizer"}))

    ids, mask = Tokenizer(tmp_path)(["dog é 狗"])
    unknown = [4 + byte for byte in "é".encode()] if byte_fallback else [3]
    assert ids[0, : mask.sum()].tolist() == [261, 260, *unknown, 260, 262, 1]


def test_written_tokenizer_is_reproducible(directory, tmp_path):
    write_tokenizer(tmp_path, CORPUS, 200)
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer/tokenizer.json").read_bytes()
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert [piece for piece, _ in vocabulary[:3]] == ["<pad>", "</s>", "<unk>"]
    assert 50 < len(vocabulary) <= 200
    for kind in (AutoTokenizer, T5TokenizerFast):
        again = kind.from_pretrained(tmp_path)
        assert len(again) == len(vocabulary)
        assert (again.pad_token_id, again.eos_token_id, again.unk_token_id) == (0, 1, 2)
