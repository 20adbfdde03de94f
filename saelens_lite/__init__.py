"""saelens_lite: hook a transformer, cache its residual stream, train sparse dictionaries, read and publish them.

    import saelens_lite as sl

`__init__.pyi` lists the public names. Each is imported on first use, so importing the package costs nothing.
"""

from importlib.metadata import version
from typing import Any

import lazy_loader

_on_first_use, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
__all__.sort()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("saelens-lite")
    if name not in __all__:
        raise AttributeError(f"module 'saelens_lite' has no attribute {name!r}")
    return _on_first_use(name)


def __dir__() -> list[str]:
    return __all__
