"""`.pth` files read without PyTorch: those that torch.save writes, and malicious or damaged ones."""

import itertools
import os
import random
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from tfm_jax.errors import InputError
from tfm_jax.wan.pth import MAX_DESCRIPTION_BYTES, open_pth

WEIGHT = torch.arange(6.0).reshape(2, 3)


def refused(file, words):
    with pytest.raises(InputError, match=f"^{file}: .*{words}") as caught:
        open_pth(file)
    message = str(caught.value)
    assert "\n" not in message
    assert "weights_only" not in message
    return message


def rewritten(file, change, compression=zipfile.ZIP_STORED):
    """Replace the content of every record by `change(name without folder, content)`; None removes the record."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            new = change(name.split("/", 1)[1], content)
            if new is not None:
                archive.writestr(name, new)
    return file


@pytest.fixture
def file(tmp_path):
    torch.save({"a": WEIGHT, "b": WEIGHT[0] + 1}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


# --- Accepted files ---------------------------------------------------------------------------------------------------


def test_every_floating_type(tmp_path):
    dtypes = {"a": np.float64, "b": np.float32, "c": np.float16, "d": ml_dtypes.bfloat16}
    torch.save(
        {"a": WEIGHT.double(), "b": WEIGHT, "c": WEIGHT.half(), "d": WEIGHT.bfloat16()}, tmp_path / "weights.pth"
    )
    tensors = open_pth(tmp_path / "weights.pth")
    for name, dtype in dtypes.items():
        assert tensors[name].shape == (2, 3)
        value = tensors[name].read(...)
        assert value.dtype == dtype
        np.testing.assert_array_equal(value.astype(np.float32), WEIGHT.numpy())
        np.testing.assert_array_equal(tensors[name].read((slice(1, 2), slice(0, 2))).astype(np.float32), [[3, 4]])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_state_dictionaries_parameters_and_views(tmp_path, protocol):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    state = module.state_dict()
    for content in (state, dict(module.named_parameters())):
        torch.save(content, tmp_path / "weights.pth", pickle_protocol=protocol)
        tensors = open_pth(tmp_path / "weights.pth")
        assert list(tensors) == list(state)
        for name, value in state.items():
            np.testing.assert_array_equal(tensors[name].read(...), value.numpy())

    odd = {"tied": WEIGHT, "same": WEIGHT, "scalar": torch.tensor(3.0), "none": torch.zeros(0, 3)}
    odd["part"] = torch.arange(10.0)[4:]
    torch.save(odd, tmp_path / "weights.pth", pickle_protocol=protocol)
    for name, entry in open_pth(tmp_path / "weights.pth").items():
        np.testing.assert_array_equal(entry.read(...), odd[name].numpy())


def test_needs_no_torch(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    np.testing.assert_array_equal(open_pth(file)["a"].read(...), WEIGHT.numpy())


# --- Anything but plain tensors ---------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: {"a": torch.empty(2, device="meta")}, "'a' is the result of 'torch._utils._rebuild_meta_tensor"),
        (lambda: {1: WEIGHT}, "a dictionary has a key that is of type int; expected tensor names"),
        (lambda: {"a": torch.zeros(2, dtype=torch.complex64).conj()}, "'a' is the result of"),
        (lambda: {"a": WEIGHT._neg_view()}, "'a' is the result of"),
        (lambda: {"a": torch.zeros(2, dtype=torch.complex64)}, "'a' is in a torch.ComplexFloatStorage; expected"),
        (lambda: {"a": torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)}, "_rebuild_qtensor"),
        (lambda: {"a": WEIGHT.to(torch.float8_e4m3fn)}, "_rebuild_tensor_v3"),
        (lambda: {"a": WEIGHT.to_sparse()}, "_rebuild_sparse_tensor"),
        (lambda: {"a": torch.arange(3)}, "'a' is in a torch.LongStorage; expected"),
        (lambda: {"a": WEIGHT.T}, "'a' is not contiguous or exceeds its storage; expected contiguous"),
        (lambda: {"a": torch.zeros(1).expand(10**9)}, "'a' is not contiguous"),
        (lambda: {"a": WEIGHT.flatten()[:4], "b": WEIGHT.flatten()[2:]}, "'a' and 'b' overlap in the file"),
        (lambda: {"a": WEIGHT, "b": WEIGHT[1]}, "'a' and 'b' overlap in the file"),
        (lambda: {"state_dict": {"a": WEIGHT}}, "'state_dict' is of type dict; expected a plain tensor"),
        (lambda: {"a": 3}, "'a' is of type int; expected a plain tensor"),
        (lambda: WEIGHT, "the content is of type tensor; expected a dictionary"),
        (lambda: [WEIGHT], "opcode EMPTY_LIST; expected a dictionary"),
        (lambda: {"a": os.mkdir}, r"'a' is 'posix\.mkdir'"),
        (lambda: {"a": Evil()}, r"'a' is the result of 'posix\.mkdir'"),
        (lambda: Evil(), r"the content is the result of 'posix\.mkdir'"),
        (lambda: {"a" * 10**5: 3}, r"'a{50,60}\.\.\.a+' is of type int"),
    ],
)
def test_other_content(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    torch.save(content(), tmp_path / "weights.pth")
    assert len(refused(tmp_path / "weights.pth", words)) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_the_format_before_version_1_6(tmp_path):
    torch.save({"a": WEIGHT}, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "weights.pth", "not a zip archive, the format that PyTorch has used since .* torch.save")


# --- Archives that PyTorch would not write ----------------------------------------------------------------------------


def test_another_program_may_pack_it(file):
    tensors = open_pth(rewritten(file, lambda name, content: content))
    np.testing.assert_array_equal(tensors["a"].read(...), WEIGHT.numpy())


@pytest.mark.parametrize(
    ("record", "content", "words"),
    [
        ("data/0", b"123", "'a' has a record of 3 bytes; expected a record of 24 bytes"),
        ("data/0", None, "'a' has no record; expected a record of 24 bytes"),
        ("data.pkl", None, "the zip archive contains 0 data.pkl; expected exactly one"),
        ("data.pkl", b"", "data.pkl is damaged"),
        ("data.pkl", b"\x80\x02}", "data.pkl is damaged"),
        ("data.pkl", b"\x80\x02}X\1\0\0\0aK\1sX\1\0\0\0aK\1s.", "key 'a' is given more than once"),
        ("data.pkl", b"\x80\x02)" + b"\x85" * 20_000 + b".", "the content is of type tuple"),
        ("data.pkl", b"\x80\x02})" + b"\x85" * 20_000 + b"K\1s.", "a key that is of type tuple"),
        ("data.pkl", b"\x80\x02" + b"}" * 20_000 + b".", "data.pkl is damaged"),
        ("data.pkl", b"\x80\x02" + b"}" * 2**24 + b".", f"{2**24 + 3} bytes; expected at most {MAX_DESCRIPTION_BYTES}"),
        ("byteorder", b"big", "byteorder is b'big'; expected little"),
        ("byteorder", b"l" * 2**24, f"{2**24} bytes; expected at most {MAX_DESCRIPTION_BYTES}"),
    ],
)
def test_records_that_do_not_fit(file, record, content, words):
    refused(rewritten(file, lambda name, old: content if name == record else old), words)


def test_compressed_records(file):
    """Compressed bytes cannot be memory-mapped as numbers, and 64 kB of them can expand to 64 MB."""

    def bomb(name, content):
        return b"\x80\x02" + b"}" * 2**26 + b"." if name == "data.pkl" else content

    refused(rewritten(file, lambda name, content: content, zipfile.ZIP_DEFLATED), "is compressed or encrypted")
    rewritten(file, bomb, zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    try:
        refused(file, "is compressed or encrypted")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_records_that_overlap(file):
    raw = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        first, second = (archive.getinfo(f"weights/data/{key}") for key in "01")
    entry = raw.rindex(b"weights/data/1") - 46  # in the directory
    assert raw[entry : entry + 4] == b"PK\1\2"
    moved = first.header_offset.to_bytes(4, "little")
    assert raw[entry + 42 : entry + 46] == second.header_offset.to_bytes(4, "little")
    file.write_bytes(raw[: entry + 42] + moved + raw[entry + 46 :])
    refused(file, "record 'weights/data/[01]' overlaps another")


def test_a_record_twice(file):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("weights/data/0", b"other")
    refused(file, "record 'weights/data/0' is in the archive more than once")


def test_a_directory_larger_than_any_of_wan(file):
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(20):
            archive.writestr(f"{number}{'x' * 60_000}", b"")
    refused(file, f"bytes; expected at most {MAX_DESCRIPTION_BYTES}")


def test_damaged_files(file):
    """A file cut anywhere or with random bytes is refused, or read with the same names, shapes and dtypes."""
    raw = file.read_bytes()
    rng = random.Random(0)
    cuts = (raw[: rng.randrange(len(raw))] for _ in range(100))

    def spoilt():
        damaged = bytearray(raw)
        for _ in range(rng.choice([1, 1, 2, 8])):
            damaged[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(damaged)

    outcomes = set()
    for damaged in itertools.chain(cuts, (spoilt() for _ in range(300))):
        file.write_bytes(damaged)
        try:
            tensors = open_pth(file)
        except InputError:
            outcomes.add("refused")
        else:
            assert {name: entry.shape for name, entry in tensors.items()} == {"a": (2, 3), "b": (3,)}
            assert all(entry.read(...).dtype == np.float32 for entry in tensors.values())
            outcomes.add("read")
    assert outcomes == {"refused", "read"}
