"""Activations as people hold them: other forms of the same numbers give what the tensor gives."""

import numpy as np
import pandas as pd
import pytest
import torch

import saelens_lite as sl
from saelens_lite.arrays import as_tensor
from saelens_lite.cache import TensorSource
from saelens_lite.errors import ConfigError, ShapeError

SETTINGS = {"d_sae": 12, "options": {"k": 3}, "n_tokens": 200, "batch_size": 20}
NUMBERS = np.random.default_rng(0).standard_normal((40, 6)).astype("float32")


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


FORMS = {  # of the same numbers
    "float32 array": NUMBERS,
    "float64 array": NUMBERS.astype("float64"),
    "big-endian array": NUMBERS.astype(">f4"),
    "Fortran order": np.asfortranarray(NUMBERS),
    "reversed view": NUMBERS[::-1].copy()[::-1],
    "read-only array": read_only(NUMBERS),
    "list": NUMBERS.tolist(),
    "tuple of lists": tuple(NUMBERS.tolist()),
    "list of arrays": list(NUMBERS),
    "list of tensors": list(torch.tensor(NUMBERS)),
    "DataFrame": pd.DataFrame(NUMBERS, columns=list("abcdef")),
    "DataFrame of float64": pd.DataFrame(NUMBERS.astype("float64")),
}


@pytest.fixture
def dictionary() -> sl.Dictionary:
    return sl.Dictionary.create("topk", reads=6, d_sae=12, options={"k": 3})


@pytest.mark.parametrize("x", FORMS.values(), ids=FORMS)
def test_every_form_gives_what_the_tensor_gives(dictionary, x):
    tensor = torch.tensor(NUMBERS)
    assert torch.equal(as_tensor(x), tensor.to(as_tensor(x).dtype))
    codes = dictionary.encode(x)
    assert torch.equal(codes.to_dense(), dictionary.encode(tensor).to_dense())
    assert torch.equal(dictionary.pre(x), dictionary.pre(tensor))
    assert torch.equal(dictionary(x).float(), dictionary(tensor))
    assert torch.equal(dictionary.decode(codes, x), dictionary.decode(codes, tensor))
    assert torch.equal(dictionary.change(x, [sl.Clamp(3, 2.0)]), dictionary.change(tensor, [sl.Clamp(3, 2.0)]))
    trained, wanted = (sl.fit(given, **SETTINGS).state_dict() for given in (x, tensor))
    assert all(torch.equal(trained[name], value) for name, value in wanted.items())
    assert torch.equal(TensorSource({"a": x}).statistics("a").mean, TensorSource(tensor).statistics("x").mean)


def test_arrays_keep_their_dtype_and_are_copied():
    x = NUMBERS.astype("float64").copy()
    tensor = as_tensor(x)
    assert tensor.dtype == torch.float64
    x[0, 0] = 99
    assert tensor[0, 0] != 99
    assert as_tensor(tensor) is tensor


def test_a_float64_array_comes_back_as_float64(dictionary):
    assert dictionary(NUMBERS.astype("float64")).dtype == torch.float64
    assert dictionary(NUMBERS.tolist()).dtype == torch.float32


def test_one_activation_and_many_axes(dictionary):
    assert torch.equal(dictionary(NUMBERS[0]), dictionary(torch.tensor(NUMBERS[0])))
    assert dictionary(NUMBERS.reshape(2, 20, 6)).shape == (2, 20, 6)


def test_dense_codes_may_be_an_array(dictionary):
    codes = dictionary.encode(NUMBERS).to_dense().detach()
    assert torch.equal(dictionary.decode(codes.numpy()), dictionary.decode(codes))
    assert torch.equal(dictionary.decode(codes.tolist()), dictionary.decode(codes))
    with pytest.raises(ShapeError, match=r"codes have shape \(40, 11\); this dictionary takes \[\.\.\., 12\]"):
        dictionary.decode(codes.numpy()[:, :11])


@pytest.mark.parametrize(
    ("x", "said"),
    [
        ("some text", "x is a str; expected a tensor of activations, an array of numpy, a DataFrame, or a list of rows"),
        (None, "x is a NoneType"),
        (3.5, "x is a float"),
        (
            {"blocks.1.hook_resid_pre": NUMBERS},
            "x is a dict of keys 'blocks.1.hook_resid_pre'; .* give one of its values",
        ),
        (np.array(["a", "b"]), r"x is a numpy.ndarray of shape \(2,\), dtype <U1, which holds <U1, not real numbers"),
        (NUMBERS.astype(complex), "holds complex128, not real numbers"),
        ([[1.0, 2.0], [3.0]], "x is a list of 2 entries, not an array of numbers"),
        ([[1.0, None]], "holds object, not real numbers"),
        ([torch.ones(6), torch.ones(5)], "x is a list of 2 entries, tensors that do not fit together"),
        (pd.DataFrame({"a": [1.0], "b": ["x"]}), r"x is a pandas.DataFrame of shape \(1, 2\), which holds object"),
        (iter(NUMBERS), "expected a tensor of activations"),
    ],
)
def test_what_is_no_activations_is_refused_by_name(dictionary, x, said):
    for work in (dictionary.encode, dictionary.pre, dictionary, TensorSource if not isinstance(x, dict) else dictionary.encode):
        with pytest.raises(ShapeError, match=said):
            work(x)


def test_fit_of_whole_numbers_says_so():
    with pytest.raises(ShapeError, match=r"x holds torch.int64; expected floating-point numbers"):
        sl.fit(np.ones((5, 3), dtype="int64"), **SETTINGS)


def test_a_wrong_width_is_said_of_arrays_too(dictionary):
    with pytest.raises(ShapeError, match=r"x has shape \(40, 5\); this dictionary takes \[\.\.\., 6\]"):
        dictionary.encode(NUMBERS[:, :5])


def test_an_array_is_never_on_another_device(dictionary):
    """numpy calls its device "cpu", which is no device of torch."""
    with pytest.raises(ShapeError, match=r"x is a numpy.ndarray of shape \(40, 6\), dtype float32; expected a tensor"):
        dictionary.check_input(NUMBERS)
    with pytest.raises(ConfigError, match="x is on meta, the dictionary on cpu; move one of them"):
        dictionary.encode(torch.tensor(NUMBERS).to("meta"))


@pytest.mark.parametrize(
    "texts", [pd.DataFrame({"text": ["a"], "label": [0]}), {"a", "b"}, "abc"], ids=["table", "set", "text"]
)
def test_probing_refuses_what_is_no_list_of_texts(lm, texts):
    """The columns' names of a table would be read as texts."""
    d = sl.Dictionary.create(
        "topk", reads=sl.Port(hook="blocks.1.hook_resid_pre", width=lm.d_model), d_sae=12, options={"k": 3}
    )
    with pytest.raises(sl.errors.TextError, match="expected a list of strings"):
        sl.probe(d, lm, {"data": (texts, [0, 1])}, ks=(1,))
