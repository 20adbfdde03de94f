"""saelens_lite: hook a transformer, cache its residual stream, train sparse dictionaries, read and publish them.

    import saelens_lite as sl

Everything named here is imported on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

_HOME = {
    "ActivationCache": "cache",
    "Dictionary": "dictionary",
    "EvalReport": "evaluate",
    "FeatureStore": "features",
    "LanguageModel": "model",
    "Origin": "dictionary",
    "PublishedForm": "sparsity",
    "RuleConfig": "sparsity",
    "SaelensLiteError": "errors",
    "SparseCodes": "codes",
    "Sparsity": "sparsity",
    "TrainConfig": "config",
    "capture": "cache",
    "errors": "",
    "evaluate": "evaluate",
    "fit": "train",
    "load_model": "model",
    "python_docs": "tokens",
    "register": "sparsity",
    "train": "train",
}
__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from saelens_lite import errors
    from saelens_lite.cache import ActivationCache, capture
    from saelens_lite.codes import SparseCodes
    from saelens_lite.config import TrainConfig
    from saelens_lite.dictionary import Dictionary, Origin
    from saelens_lite.errors import SaelensLiteError
    from saelens_lite.evaluate import EvalReport, evaluate
    from saelens_lite.features import FeatureStore
    from saelens_lite.model import LanguageModel, load_model
    from saelens_lite.sparsity import PublishedForm, RuleConfig, Sparsity, register
    from saelens_lite.tokens import python_docs
    from saelens_lite.train import fit, train

    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("saelens-lite")
    if name not in _HOME:
        raise AttributeError(f"module 'saelens_lite' has no attribute {name!r}")
    module = import_module(f"saelens_lite.{_HOME[name] or name}")
    return getattr(module, name) if _HOME[name] else module


def __dir__() -> list[str]:
    return __all__
