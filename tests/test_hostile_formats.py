"""Files from strangers: whatever is wrong with one, there is a typed error, and nothing in it is executed or believed."""

import io
import json
import os
import pickle
import shutil
import signal
import struct
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import CASES, D_IN, D_SAE
from hostile import damage
from hypothesis import given, settings
from hypothesis import strategies as st

import saelens_lite as sl
from saelens_lite.errors import CorruptFileError, SaelensLiteError
from saelens_lite.formats import inspect


@contextmanager
def within(seconds: int):
    """Fail if the block hangs."""

    def fail(*_):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """The files of every case, and one dictionary of ours, to be copied before they are damaged."""
    folder = tmp_path_factory.mktemp("originals")
    found = {name: case.write(folder / str(i)) for i, (name, case) in enumerate(CASES.items())}
    return found | {"ours": sl.Dictionary.create("topk", reads=8, d_sae=16, options={"k": 2}).save(folder / "ours")}


@settings(max_examples=200)
@given(name=st.sampled_from([*CASES, "ours"]), seed=st.integers(0, 2**32))
def test_damaged_files_give_a_typed_error_or_a_sound_dictionary(originals, tmp_path_factory, name, seed):
    original = originals[name]
    copy = tmp_path_factory.mktemp("damaged") / original.name
    (shutil.copytree if original.is_dir() else shutil.copy)(original, copy)
    damage(copy, seed)
    case = CASES.get(name)
    with within(20):
        try:
            d = sl.load(copy, format=case.format if case and case.pickled else None)
        except SaelensLiteError:
            return
    assert all(torch.isfinite(tensor).all() for tensor in d.state_dict().values())
    assert d(torch.ones(2, d.d_in)).shape == (2, d.d_out)


# Pickles that want to do something


class Runs:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def torch_zip(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> Path:
    """Return a file as torch.save lays it out, around a given pickle."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        for name, content in (records or {}).items():
            archive.writestr(f"archive/data/{name}", content)
        archive.writestr("archive/version", b"3\n")
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("format", ["openai", "dictionary_learning"])
def test_a_pickle_that_would_create_a_file_does_not(format, protocol, wrapped, tmp_path):
    target, folder = tmp_path / "created", tmp_path / "folder"
    folder.mkdir()
    state = {"pre_bias": 1, "latent_bias": 2, "decoder.weight": Runs(target)}
    pickled = pickle.dumps(state, protocol=protocol)
    path = folder / "ae.pt"
    torch_zip(path, pickled) if wrapped else path.write_bytes(pickled)
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    with pytest.raises(CorruptFileError):
        sl.load(path if format == "openai" else folder, format=format)
    for place in (path, folder):
        with pytest.raises(SaelensLiteError):
            sl.load(place)
        with pytest.raises(SaelensLiteError):
            inspect(place)
    assert not target.exists()
    pickle.loads(pickled)["decoder.weight"].close()
    assert target.exists(), "the pickle is harmless; the test proves nothing"


def again_and_again(depth: int) -> bytes:
    """Return a dictionary whose key is a tuple that nests the same tuple twice, many times."""
    return b"\x80\x02}N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(depth)) + b"Ns."


def within_each_other(depth: int) -> bytes:
    """Return a dictionary that nests the same dictionary 200 times, many times."""
    state = {}
    for _ in range(depth):
        state = {str(i): state for i in range(200)}
    return pickle.dumps(state, protocol=2)


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (again_and_again(60), "repeats tuples or changes a tensor"),
        (within_each_other(3), "holds more than 1,000 tensors and settings"),
        (pickle.dumps({f"{i}": i for i in range(2000)}, protocol=2), "holds more than 1,000 tensors and settings"),
        (pickle.dumps({"a": {f"{i}": [] for i in range(2000)}}, protocol=2), "holds more than 1,000 tensors and settings"),
        (pickle.dumps([1], protocol=2), "is a list; expected tensors by name"),
        (pickle.dumps({"a" * 2_000_000: 1}, protocol=2), "too many for a dictionary"),
    ],
)
def test_small_pickles_of_very_much(pickled, reason, tmp_path):
    with within(20), pytest.raises(CorruptFileError, match=reason):
        sl.load(torch_zip(tmp_path / "v5.pt", pickled), format="openai")


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    target, good = tmp_path / "created", CASES["gemma scope"].write(tmp_path / "foreign") / "params.npz"
    arrays = dict(np.load(good)) | {"threshold": np.array([Runs(target)] * D_SAE, dtype=object)}
    np.savez(good, **arrays)
    with pytest.raises(CorruptFileError):
        sl.load(good, format="gemma_scope")
    with pytest.raises(CorruptFileError):
        sl.load(good)
    assert not target.exists()


# Sizes that are not true


class Forged:
    """A tensor whose size, stride and number of entries say what one likes."""

    def __init__(self, size, stride, numel, key="0", offset=0):
        self.arguments = size, stride, numel, key, offset

    def __reduce__(self):
        size, stride, numel, key, offset = self.arguments
        return torch._utils._rebuild_tensor_v2, (Stored(key, numel), offset, size, stride, False, OrderedDict())


class Changed(Forged):
    """A tensor that is given other numbers after it was made."""

    def __reduce__(self):
        return *super().__reduce__(), (Stored("0", 1), 0, (10**9,), (1,))


class Stored:
    """A reference to a record of the archive."""

    def __init__(self, key, numel):
        self.pid = ("storage", torch.FloatStorage, key, "cpu", numel)


class TensorPickler(pickle.Pickler):
    """A stand-in for the pickle module that torch.save uses."""

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Stored) else None


@pytest.mark.parametrize(
    "tensor",
    [
        Forged((D_SAE, D_IN), (D_IN, 1), 10**9),  # the record has far fewer
        Forged((D_SAE, D_IN), (D_IN, 1), 2**62),
        Forged((10**6, 10**6), (0, 0), 1),  # one number, a million million times
        Forged((10**6, 10**6), (10**6, 1), 1),
        Forged((D_SAE, D_IN), (D_IN, 1), D_SAE * D_IN, key="1"),  # no such record
        Forged((D_SAE, D_IN), (D_IN, 1), D_SAE * D_IN, key="../../version"),
        Forged((D_SAE, D_IN), (-D_IN, 1), D_SAE * D_IN),
        Forged((D_SAE, D_IN), (D_IN, 1), D_SAE * D_IN, offset=10**12),
        Forged((D_SAE, D_IN), (D_IN, 1), D_SAE * D_IN, offset=-8),
        Changed((D_SAE, D_IN), (D_IN, 1), D_SAE * D_IN),
    ],
)
def test_forged_tensors_of_a_pickle(tensor, tmp_path):
    buffer = io.BytesIO()
    TensorPickler(buffer, protocol=2).dump({"encoder.weight": tensor, "pre_bias": 1, "latent_bias": 1})
    path = torch_zip(tmp_path / "v5.pt", buffer.getvalue(), {"0": bytes(4 * D_SAE * D_IN)})
    with within(20), pytest.raises(CorruptFileError):
        sl.load(path, format="openai")


def test_an_honest_pickle_made_in_the_same_way_is_read(tmp_path):
    def stored(i, *size):
        return Forged(size, (size[1], 1) if len(size) == 2 else (1,), int(np.prod(size)), key=str(i))

    shapes = {"encoder.weight": (D_SAE, D_IN), "decoder.weight": (D_IN, D_SAE), "pre_bias": (D_IN,), "latent_bias": (D_SAE,)}
    buffer = io.BytesIO()
    TensorPickler(buffer, protocol=2).dump({name: stored(i, *size) for i, (name, size) in enumerate(shapes.items())})
    records = {str(i): np.full(size, i, np.float32).tobytes() for i, size in enumerate(shapes.values())}
    d = sl.load(torch_zip(tmp_path / "v5.pt", buffer.getvalue(), records), format="openai")
    assert (d.W_dec == 1).all()
    assert (d.b_enc == 3).all()
    with pytest.raises(CorruptFileError, match=r"was not written by torch\.save"):
        sl.load(torch_zip(tmp_path / "z.pt", buffer.getvalue(), records, zipfile.ZIP_DEFLATED), format="openai")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": [10**6, 10**6]}, "has shape"),
        ({"shape": [D_IN, -D_SAE]}, "has shape"),
        ({"shape": [D_IN, D_SAE * 1.0]}, "has shape"),
        ({"shape": 5}, "damaged, or of a type not read"),
        ({"dtype": "F8_E4M3"}, "damaged, or of a type not read"),
        ({"dtype": "I32"}, r"dtype torch\.int32; expected one of float32"),
        ({"data_offsets": [0]}, "damaged"),
        ({"data_offsets": [10**15, 10**15 + 960]}, "announces"),
    ],
)
def test_forged_headers_of_safetensors(changes, reason, tmp_path):
    path = CASES["standard"].write(tmp_path / "foreign") / "sae_weights.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header["W_enc"] |= changes
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + size :])
    with pytest.raises(CorruptFileError, match=reason):
        sl.load(path.parent, format="saelens")


def test_settings_that_announce_more_than_the_weights_hold(tmp_path):
    path = CASES["standard"].write(tmp_path / "foreign") / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_sae": 2**31 - 1, "d_in": 2**31 - 1}))
    with pytest.raises(CorruptFileError, match="W_enc has shape"):
        sl.load(path.parent)


def test_arrays_that_unpack_to_far_more_than_the_file(tmp_path):
    zeros = np.zeros((4000, 4000), np.float32)
    small = np.zeros(4000, np.float32)
    np.savez_compressed(tmp_path / "params.npz", W_enc=zeros, W_dec=zeros, b_enc=small, b_dec=small, threshold=small)
    with pytest.raises(CorruptFileError, match="far too large"):
        sl.load(tmp_path, format="gemma_scope")


def test_arrays_that_hold_far_more_than_they_announce(tmp_path):
    """They are unpacked as far as announced."""
    arrays = dict(np.load(CASES["gemma scope"].write(tmp_path / "foreign") / "params.npz"))
    with zipfile.ZipFile(tmp_path / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(f"{name}.npy", buffer.getvalue() + bytes(64 << 20))
            member = archive.getinfo(f"{name}.npy")
            member.file_size, member.CRC = len(buffer.getvalue()), zlib.crc32(buffer.getvalue())
    tracemalloc.start()
    d = sl.load(tmp_path / "params.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(d.W_enc.detach().numpy(), arrays["W_enc"])
    assert peak < 16 << 20


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_what_is_no_file_is_not_waited_for(name, tmp_path):
    path = CASES["standard"].write(tmp_path / "foreign")
    for make in (os.mkfifo, os.mkdir, lambda file: file.symlink_to("/dev/zero"), lambda file: file.symlink_to(file)):
        (path / name).unlink() if (path / name).is_symlink() or not (path / name).is_dir() else (path / name).rmdir()
        make(path / name)
        for format in (None, "saelens"):
            with within(20), pytest.raises(SaelensLiteError):
                sl.load(path, format=format)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ('{"lr": "\\ud800"}', "surrogates not allowed"),
        ('{"\\ud83d\\ude00": "\\\\ud800"}', None),
        ('{"lr": ' + "[" * 99 + "]" * 99 + "}", "settings are nested deeper than 50 levels"),
        ('{"lr": ' + "[" * 101 + "]" * 101 + "}", "is not valid JSON: nested deeper than 100 levels"),
        ('{"lr": "' + "a" * (1 << 20) + '"}', "bytes of settings; .*1,048,576"),
        ('{"lr": ' + "1" * 5000 + "}", "is not valid JSON"),
    ],
)
def test_settings_that_could_not_be_written_again(settings, reason, tmp_path):
    path = CASES["standard"].write(tmp_path / "foreign")
    given = (path / "cfg.json").read_text()
    (path / "cfg.json").write_text(given.rstrip()[:-1] + ", " + settings[1:])
    if reason is None:
        own = sl.load(sl.load(path).save(tmp_path / "own"))
        assert own.training_record["read_from"]["config"]["😀"] == "\\ud800"
    else:
        with pytest.raises(CorruptFileError, match=reason):
            sl.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(value, tmp_path):
    for name, file in (("gemma scope", "params.npz"), ("gemma scope 2", "params.safetensors")):
        case = CASES[name]
        path = case.write(tmp_path / name)
        content = bytearray((path / file).read_bytes())
        at = content.find(np.float32(case.exact["b_dec"][3]).tobytes())
        content[at : at + 4] = np.float32(value).tobytes()
        (path / file).write_bytes(content)
        with pytest.raises(CorruptFileError, match=r"NaN or infinity|Bad CRC-32"):
            sl.load(path, format="gemma_scope")
