"""saelens_lite: hook a transformer, cache its residual stream, train sparse dictionaries, read and publish them.

    import saelens_lite as sl

Everything named here is imported on first use, so that importing the package costs nothing.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

_HOME = {
    "Ablate": "interventions.edits",
    "ActivationCache": "cache",
    "ActivationStream": "cache",
    "Add": "interventions.edits",
    "Clamp": "interventions.edits",
    "Dictionary": "dictionary",
    "EvalReport": "evaluate",
    "FeatureStore": "features",
    "Format": "formats",
    "LanguageModel": "model",
    "LivePrompt": "views.live",
    "Logger": "loggers",
    "Origin": "config",
    "Port": "ports",
    "PublishedForm": "sparsity",
    "RuleConfig": "sparsity",
    "SaelensLiteError": "errors",
    "Scale": "interventions.edits",
    "SparseCodes": "codes",
    "Sparsity": "sparsity",
    "TextConfig": "config",
    "TrainConfig": "config",
    "adapters": "",
    "attribute": "interventions.attribution",
    "capture": "cache",
    "compare": "features.compare",
    "convert": "formats",
    "dose_response": "interventions.doses",
    "errors": "",
    "evaluate": "evaluate",
    "fit": "train",
    "load_model": "model",
    "probe": "evaluate.probing",
    "prompt_view": "views.prompt",
    "pull": "hub",
    "push": "hub",
    "python_docs": "tokens",
    "register": "registry",
    "resume": "train",
    "stability": "features.compare",
    "train": "train",
}
__all__ = [
    "Ablate",
    "ActivationCache",
    "ActivationStream",
    "Add",
    "Clamp",
    "Dictionary",
    "EvalReport",
    "FeatureStore",
    "Format",
    "LanguageModel",
    "LivePrompt",
    "Logger",
    "Origin",
    "Port",
    "PublishedForm",
    "RuleConfig",
    "SaelensLiteError",
    "Scale",
    "SparseCodes",
    "Sparsity",
    "TextConfig",
    "TrainConfig",
    "__version__",
    "adapters",
    "attribute",
    "capture",
    "compare",
    "convert",
    "dose_response",
    "errors",
    "evaluate",
    "fit",
    "load_model",
    "probe",
    "prompt_view",
    "pull",
    "push",
    "python_docs",
    "register",
    "resume",
    "stability",
    "train",
]

if TYPE_CHECKING:
    from saelens_lite import adapters, errors
    from saelens_lite.cache import ActivationCache, ActivationStream, capture
    from saelens_lite.codes import SparseCodes
    from saelens_lite.config import Origin, TextConfig, TrainConfig
    from saelens_lite.dictionary import Dictionary
    from saelens_lite.errors import SaelensLiteError
    from saelens_lite.evaluate import EvalReport, evaluate
    from saelens_lite.evaluate.probing import probe
    from saelens_lite.features import FeatureStore
    from saelens_lite.features.compare import compare, stability
    from saelens_lite.formats import Format, convert
    from saelens_lite.hub import pull, push
    from saelens_lite.interventions.attribution import attribute
    from saelens_lite.interventions.doses import dose_response
    from saelens_lite.interventions.edits import Ablate, Add, Clamp, Scale
    from saelens_lite.loggers import Logger
    from saelens_lite.model import LanguageModel, load_model
    from saelens_lite.ports import Port
    from saelens_lite.registry import register
    from saelens_lite.sparsity import PublishedForm, RuleConfig, Sparsity
    from saelens_lite.tokens import python_docs
    from saelens_lite.train import fit, resume, train
    from saelens_lite.views.live import LivePrompt
    from saelens_lite.views.prompt import prompt_view

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


class _Package(ModuleType):
    """Keeps `sl.train` and `sl.evaluate` the functions: importing the module of that name would put itself there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
