"""Check arguments and results against their annotations while tests run, in a fraction of the time of jaxtyping's own wrapper.

The option --jaxtyping-packages has every function of the package decorated with `jaxtyping.jaxtyped`, and `conftest.py` puts
`checked` in its place. It makes the same checks: all arguments, then the result, with the sizes of the axes the same throughout
one call. But it looks at a function once, even if the function is inside another and so made anew in each call of that one; it
checks arguments once, not again with the result; and where there are no shapes, it keeps no sizes.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from types import CodeType, FunctionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from jaxtyping import AbstractArray, jaxtyped

Typechecker = Callable[[FunctionType], Callable[..., Any]]
_known: dict[Any, "Checks"] = {}


class Checks(NamedTuple):
    """The checks of all functions that one piece of source code makes."""

    arguments: Callable[..., None]
    result: Callable[[Any], Any]  # returns its argument
    has_shapes: bool
    code: CodeType  # kept, so that no other gets its id

    @classmethod
    def of(cls, function: FunctionType, typechecker: Typechecker) -> "Checks":
        """Return the checks of a function, which may be known from one with the same code and annotations."""
        key = (id(function.__code__), *((name, _key(hint)) for name, hint in function.__annotations__.items()))
        try:
            return _known[key]
        except KeyError:
            checks = _known[key] = cls._made(function, typechecker)
            return checks
        except TypeError:  # an annotation has no hash
            return cls._made(function, typechecker)

    @classmethod
    def _made(cls, function: FunctionType, typechecker: Typechecker) -> "Checks":
        hints = {name: _resolved(hint, function.__globals__) for name, hint in function.__annotations__.items()}
        returned = {"return": hints.pop("return")} if "return" in hints else {}
        arguments, result = _same_arguments(function), lambda result: result
        for stub, annotations in ((arguments, hints), (result, returned)):
            stub.__name__, stub.__qualname__ = function.__name__, function.__qualname__
            stub.__module__, stub.__annotations__ = function.__module__, annotations
        has_shapes = any(map(_has_shape, [*hints.values(), *returned.values()]))
        return cls(typechecker(arguments), typechecker(result), has_shapes, function.__code__)


def checked(function: Any = None, **settings: Typechecker) -> Any:
    """Decorate a function so that each call is checked. Whatever else `jaxtyped` takes is left to it, such as a class."""
    if function is None:
        return lambda function: checked(function, **settings)
    if not inspect.isfunction(function) or "typechecker" not in settings:
        return jaxtyped(function, **settings)
    if not function.__annotations__:
        return function
    arguments, result, has_shapes, _ = Checks.of(function, **settings)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        arguments(*args, **kwargs)
        return result(function(*args, **kwargs))

    @wraps(function)
    def call_with_sizes(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with jaxtyped("context"):
            arguments(*args, **kwargs)
            return result(function(*args, **kwargs))

    call = call_with_sizes if has_shapes else call
    call.__code__ = call.__code__.replace(co_filename="<checked>")  # not a place in which somebody looks for a fault
    return call


def _same_arguments(function: FunctionType) -> FunctionType:
    """Return a function that takes the arguments of another and does nothing."""
    code, nothing = function.__code__, (lambda: None).__code__
    stars = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    n = code.co_argcount + code.co_kwonlyargcount + stars.bit_count()
    counts = {name: getattr(code, name) for name in ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount")}
    same = nothing.replace(co_varnames=code.co_varnames[:n], co_nlocals=n, co_flags=nothing.co_flags | stars, **counts)
    stub = FunctionType(same, function.__globals__, argdefs=function.__defaults__)
    stub.__kwdefaults__ = function.__kwdefaults__
    return stub


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """Return an annotation without strings. What is known only to a type checker is Any."""

    def holder() -> None: ...

    holder.__annotations__ = {"return": hint}
    try:
        return get_type_hints(holder, names, include_extras=True)["return"]
    except Exception:
        return Any


def _key(hint: Any) -> Any:
    """Return what equal annotations have in common: each Float[…] is a class of its own."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return hint.dtype, hint.array_type, hint.dim_str
    if isinstance(hint, list):  # the arguments of a Callable
        return tuple(map(_key, hint))
    return (get_origin(hint), *map(_key, get_args(hint))) if get_args(hint) else hint


def _has_shape(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, AbstractArray)) or any(map(_has_shape, get_args(hint)))
