"""The checks of annotations that hold while tests run let pass and refuse the same calls as jaxtyping's own."""

from collections.abc import Callable, Iterator
from typing import NoReturn

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from checked import Checks, checked, jaxtyped
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import saelens_lite as sl

REFUSED = (BeartypeCallHintViolation, TypeCheckError)


def product(a: Float[Tensor, "n k"], /, b: Float[Tensor, "k m"], *, scale: float = 1.0) -> Float[Tensor, "n m"]:
    return a @ b * scale if scale else b


def count(*parts: Float[Tensor, " n"], **more: int) -> int:
    return len(parts) + sum(more.values())


def one_by_one(x: Float[Tensor, "n m"]) -> Iterator[Float[Tensor, " m"]]:
    yield from x


def unknown(x: "Elsewhere", n: "int") -> "list[Float[Tensor, ' n']]":  # noqa: F821
    return [x] * n


def without_annotations(x, n):
    return x


def stops(n: int) -> NoReturn:
    raise ZeroDivisionError(n)


A, B = torch.ones(2, 3), torch.ones(3, 4)
CALLS = [
    (product, (A, B), {}, True),
    (product, (A,), {"b": B, "scale": 2.0}, True),
    (product, (A, A), {}, False),
    (product, (A, B), {"scale": 0.0}, False),  # the result is [k m]
    (product, (A, B), {"scale": "2"}, False),
    (product, (A[0], B), {}, False),
    (product, (A.long(), B), {}, False),
    (count, (A[0], A[1]), {"more": 3}, True),
    (count, (A[0], B[0]), {}, False),
    (count, (A[0],), {"more": 0.5}, False),
    (one_by_one, (A,), {}, True),
    (one_by_one, (A[0],), {}, False),
    (unknown, (A[0], 2), {}, True),
    (unknown, (A[0], 2.0), {}, False),
    (unknown, (A, 2), {}, False),
    (without_annotations, (A, "B"), {}, True),
]


@pytest.mark.parametrize("decorate", [jaxtyped, checked], ids=["jaxtyping", "ours"])
@pytest.mark.parametrize(("function", "args", "kwargs", "fits"), CALLS)
def test_a_call_is_let_pass_or_refused(decorate, function, args, kwargs, fits):
    decorated = decorate(function, typechecker=beartype)
    if fits:
        decorated(*args, **kwargs)
    else:
        with pytest.raises(REFUSED):
            decorated(*args, **kwargs)


@pytest.mark.parametrize("decorate", [jaxtyped, checked], ids=["jaxtyping", "ours"])
def test_errors_of_the_function_and_of_its_call_stay_what_they_are(decorate):
    with pytest.raises(ZeroDivisionError):
        decorate(stops, typechecker=beartype)(3)
    with pytest.raises(TypeError, match="missing"):
        decorate(product, typechecker=beartype)(A)
    with pytest.raises(REFUSED):
        decorate(product, typechecker=beartype)(A, A)
    decorate(product, typechecker=beartype)(A, B)  # an error leaves no sizes behind


@pytest.mark.parametrize("decorate", [jaxtyped, checked], ids=["jaxtyping", "ours"])
def test_sizes_belong_to_one_call(decorate):
    @decorate(typechecker=beartype)
    def inner(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return x

    @decorate(typechecker=beartype)
    def outer(x: Float[Tensor, " n"], shorter: bool) -> Float[Tensor, " n"]:
        part = inner(x[1:])
        return part if shorter else x

    outer(A[0], False)
    with pytest.raises(REFUSED):
        outer(A[0], True)


def test_functions_made_again_share_their_checks():
    def make(kind: type) -> Callable[..., object]:
        def inner(x: kind) -> Float[Tensor, " n"]:
            return torch.ones(2)

        return inner

    first, again, other = make(int), make(int), make(str)
    assert Checks.of(first, beartype) is Checks.of(again, beartype)
    for function, given in ((first, 1), (other, "1")):
        checked(function, typechecker=beartype)(given)
        with pytest.raises(REFUSED):
            checked(function, typechecker=beartype)(0.5)


def test_sizes_of_a_block_are_left_to_jaxtyping():
    with checked("context"):
        assert isinstance(A, Float[Tensor, "n m"])
        assert not isinstance(B, Float[Tensor, "n m"])


def test_functions_of_the_package_are_checked():
    assert jaxtyping.jaxtyped is checked
    codes = sl.SparseCodes.from_dense(A)
    codes.decode(torch.ones(3, 5))
    with pytest.raises(REFUSED):
        codes.decode(torch.ones(3))
