"""Options that several commands share."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field

from saelens_lite.cli import checks
from saelens_lite.config import TextConfig
from saelens_lite.errors import CorruptFileError, OutputExistsError
from saelens_lite.paths import check_output

if TYPE_CHECKING:
    from saelens_lite.dictionary import Dictionary
    from saelens_lite.features import FeatureStore
    from saelens_lite.model import AnyModel

DICTIONARY = (
    "a folder of ours or of a run, a folder or file of another tool, or an address such as hf://user/repo/folder@revision."
)

ModelDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Parameter(
        help="Number type of the model. auto is float32, but on CUDA the checkpoint's own; float32 checkpoints then have TF32 "
        "products, which float32 turns off."
    ),
]
DeviceMap = Annotated[
    Literal["auto", "tp"] | None,
    Parameter(
        help="For models larger than a device: auto spreads the model over GPUs, memory and disk; tp cuts it into a part for "
        "each process."
    ),
]
Flag = Annotated[bool, Parameter(negative="")]
Exists = Annotated[Literal["error", "overwrite"], Parameter(help="If the output exists: stop with an error, or overwrite it.")]
DictionaryPath = Annotated[Path, Parameter(validator=checks.dictionaries, help=f"The dictionary: {DICTIONARY}")]
DictionaryPaths = Annotated[list[Path], Parameter(validator=checks.dictionaries, help=f"Dictionaries, each {DICTIONARY}")]
StoreFolder = Annotated[Path, Parameter(help="Feature store: a folder that `features --out` wrote.")]
StoreOption = Annotated[
    Path | None,
    Parameter(
        help="Feature store of the dictionary, which `features --out` wrote. It adds labels, promoted tokens and maxima."
    ),
]
TextName = Annotated[
    str,
    Parameter(
        validator=lambda _, name: None if name is None else checks.text_exists(name),
        help="A .txt, .md, .csv, .jsonl or .parquet file; hf:org/name:config:split for a dataset on the Hugging Face Hub; or "
        '"python-docs", "python-docs:train", "python-docs:held-out" for the embedded corpus.',
    ),
]
TextOptions = Annotated[TextConfig, Parameter(name="*")]


class TextOfDictionary(TextConfig):
    """Settings for reading text with a dictionary, whose training gives the default length of rows."""

    n_ctx: int | None = Field(
        None, description="Tokens in a row, BOS included; default: the dictionary's training length, if it says that."
    )


TextOfDictionaryOptions = Annotated[TextOfDictionary, Parameter(name="*")]
ReadAs = Annotated[str | None, Parameter(help="Name of the format plugin that reads the files. Needed only for pickles.")]


def _check_report(_: Any, path: Path | None) -> None:
    """Raise before the work begins if the report cannot be written, or if it would replace a file that is not JSON."""
    from saelens_lite.files import read_json

    if path is not None and os.path.lexists(check_output(path)):
        try:
            read_json(path, limit=math.inf)
        except CorruptFileError as error:
            raise OutputExistsError(f"{path} exists but is not an earlier report ({error}); choose another file") from None


JsonFile = Annotated[
    Path | None, Parameter(name="--json", validator=_check_report, help="JSON file for all numbers; replaces an earlier one.")
]
PrintJson = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of text.")]


@dataclass(frozen=True)
class OfModel:
    """The model and hook that dictionaries run on.

    Parameters
    ----------
    model
        "tiny", a Hugging Face Hub id, or a folder; default: the model the dictionary was trained on. For a dictionary of
        several models, NAME=MODEL for each, such as --model base=gpt2 --model chat=org/gpt2-chat.
    hook
        Hook that the dictionary reads. Needed only for a dictionary that does not name its hook.
    device
        Device to run on, e.g. cuda; default: CUDA if available, else MPS if it works, else the CPU.
    model_revision
        Commit, branch or tag of the model on the Hub; default: the commit the dictionary was trained on.
    trust_remote_code
        Run Python code that comes with the model's files. Needs --model, so that a dictionary never decides which code runs.
    """

    model: list[str] | None = None
    hook: str | None = None
    device: str | None = None
    device_map: DeviceMap = None
    model_dtype: ModelDtype = "auto"
    model_revision: str | None = None
    trust_remote_code: Flag = False

    def __post_init__(self) -> None:
        """Raise at once if the model or the hook cannot be right."""
        for model in self.named.values() or self.model or ():
            checks.model_has(model, [self.hook] if self.hook else [])

    @property
    def named(self) -> dict[str, str]:
        """The models given by name; empty if none is, or one without a name."""
        return checks.named_models(self.model or ())

    def model_of(self, *dictionaries: "Dictionary") -> "AnyModel":
        """Return the model or models named by --model, else the dictionaries' own, processed as in training."""
        from saelens_lite.model import model_for

        return model_for(
            *dictionaries,
            name=self.named or (self.model[0] if self.model else None),
            revision=self.model_revision,
            device=self.device,
            device_map=self.device_map,
            dtype=self.model_dtype,
            trust_remote_code=self.trust_remote_code,
        )

    def load(self, path: Path) -> "tuple[Dictionary, AnyModel]":
        """Return a dictionary and its model, on one device."""
        import saelens_lite as sl

        dictionary = sl.load(path)
        lm = self.model_of(dictionary)
        return dictionary.to(lm.device), lm


def store_of(folder: Path | None, dictionary: "Dictionary") -> "FeatureStore | None":
    """Return the store in a folder, which must belong to a dictionary; None without a folder."""
    from saelens_lite.features import FeatureStore

    return None if folder is None else FeatureStore.load(folder, dictionary)


ModelOptions = Annotated[OfModel, Parameter(name="*")]
THE_MODEL = OfModel()


def given(**flags: Any) -> dict[str, Any]:
    """Return the flags that have a value."""
    return {name: value for name, value in flags.items() if value is not None}
