"""The public names, for type checkers and editors; `__init__.py` imports each of them on first use."""

from . import adapters as adapters
from . import errors as errors
from .addresses import convert as convert
from .addresses import load as load
from .cache import ActivationCache as ActivationCache
from .cache import ActivationStream as ActivationStream
from .cache import capture as capture
from .codes import SparseCodes as SparseCodes
from .config import Origin as Origin
from .config import StoreConfig as StoreConfig
from .config import TextConfig as TextConfig
from .config import TrainConfig as TrainConfig
from .dictionary import Dictionary as Dictionary
from .errors import SaelensLiteError as SaelensLiteError
from .evaluation import EvalReport as EvalReport
from .evaluation import evaluate as evaluate
from .evaluation.probing import probe as probe
from .features import FeatureStore as FeatureStore
from .features.compare import compare as compare
from .features.compare import stability as stability
from .formats import Format as Format
from .hub import pull as pull
from .hub import push as push
from .interventions.attribution import attribute as attribute
from .interventions.doses import dose_response as dose_response
from .interventions.edits import Ablate as Ablate
from .interventions.edits import Add as Add
from .interventions.edits import Clamp as Clamp
from .interventions.edits import Scale as Scale
from .loggers import Logger as Logger
from .model import LanguageModel as LanguageModel
from .model import load_model as load_model
from .ports import Port as Port
from .registry import register as register
from .sparsity import PublishedForm as PublishedForm
from .sparsity import RuleConfig as RuleConfig
from .sparsity import Sparsity as Sparsity
from .tokens import python_docs as python_docs
from .training import fit as fit
from .training import resume as resume
from .training import train as train
from .views.live import LivePrompt as LivePrompt
from .views.prompt import prompt_view as prompt_view

__version__: str
