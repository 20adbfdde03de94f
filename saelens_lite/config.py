"""Frozen, validated settings: what a user may ask for, with a sentence on each field.

A settings object is data: no I/O, no ids, no devices. An unknown key is an error that names the nearest known one.
"""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saelens_lite.errors import ConfigError, CorruptFileError, near_matches
from saelens_lite.paths import check_input

MOST = 2**53  # of whole numbers in settings
MAX_TOML_BYTES = 1 << 20


class FrozenConfig(BaseModel):
    """Base of all settings: immutable, no unknown keys, `ConfigError` with a one-line reason on bad values."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error)) from None

    def replace(self, **changes: Any) -> "FrozenConfig":
        """Return a copy with some fields changed, validated like a new one."""
        return type(self)(**{**self.model_dump(exclude_unset=True), **changes})


def _explain(config: type[BaseModel], error: ValidationError) -> str:
    """Return one line for a validation error: each offending key, what was found and what would do."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}{near_matches(key, config.model_fields)}")
        elif item["type"] == "missing":
            lines.append(f"{key!r} is required")
        else:
            lines.append(f"{key} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return f"{config.__qualname__.replace('.Config', '')}: {'; '.join(lines)}"


class TextConfig(FrozenConfig):
    """How text is read and cut into token rows."""

    column: str = Field("text", description="Column or key that holds the text, in .jsonl, .parquet and datasets.")
    token_column: str | None = Field(
        None, description="Column or key that holds token ids, which are then read instead of text."
    )
    split: str | None = Field(None, description="Split of a dataset; default: train.")
    n_ctx: int | None = Field(
        None,
        description="Tokens in a row, BOS included; default: those the dictionary was trained on, or the model's context, but "
        "no more than 1,024.",
    )
    bos: Literal["row", "document", "none"] = Field(
        "row", description="Where BOS stands: at the head of every row, before every document, or nowhere."
    )
    pack: bool = Field(
        False, description="Fill rows with one document after another, a separator between them; only the last row is padded."
    )
    separator: Literal["eos", "bos"] = Field("eos", description="Token between two documents of a packed row.")
    min_context: int = Field(
        0,
        ge=0,
        description="Repeat this many tokens of a document at the head of each row that continues it; they count only once.",
    )
    truncate: bool = Field(False, description="Read only the beginning of each document, as much as fits into one row.")
    exclude_positions: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), description="Positions of a row that do not count; by default the first, whose norm is an outlier."
    )
    exclude_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="Token ids that do not count, in addition to the tokenizer's special tokens."
    )
    max_token_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Largest share of the counted positions that one token id may have; the rest is thinned out.",
    )


class TrainConfig(FrozenConfig):
    """One dictionary to train. Horizons are counted in tokens."""

    hook: str | None = Field(None, description="Hook to read and write; may be left out when there is only one.")
    reads: tuple[str, ...] = Field((), description="Hooks to read, in place of `hook`; with several, a crosscoder.")
    writes: tuple[str, ...] = Field(
        (), description="Hooks whose activations are predicted; default: those that are read. With another, a transcoder."
    )
    skip: bool = Field(False, description="Add a linear map of the input to the output, which is of other hooks.")
    sparsity: str = Field("topk", description="Sparsity rule: the name of a plugin (see `saelens-lite plugins`).")
    options: dict[str, Any] = Field({}, description="Options of the sparsity rule, e.g. --options.k 32.")
    d_sae: int = Field(2048, gt=0, le=MOST, description="Number of latents.")
    n_tokens: int = Field(
        1_000_000, gt=0, le=MOST, description="Activations to train on; the data is read again when it is shorter."
    )
    batch_size: int = Field(2048, gt=0, le=MOST, description="Activations per optimiser step.")
    lr: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of Adam; default 2e-4 / sqrt(d_sae / 16384), as for top-k in Gao et al. 2024.",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="Decay rates of Adam's first and second moment."
    )
    warmup: float = Field(0.02, ge=0, le=1, description="Share of the tokens over which the learning rate rises linearly.")
    decay: float = Field(0.2, ge=0, le=1, description="Share of the tokens, at the end, over which it falls linearly to zero.")
    sparsity_warmup: float = Field(
        0.1, ge=0, le=1, description="Share of the tokens over which sparsity penalties rise linearly."
    )
    clip_grad_norm: float = Field(1.0, ge=0, description="Largest norm of the whole gradient; 0: no clipping.")
    normalize: Literal["sqrt_d", "none"] = Field(
        "sqrt_d",
        description="While training, scale activations to a root mean square norm of sqrt(d_in), of a transcoder around their "
        "mean; folded in when saved.",
    )
    encoder_precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Numbers from which the latents that fire are chosen; codes and gradients are float32. auto: bfloat16 on a "
        "CUDA device.",
    )
    dead_after: int = Field(200_000, gt=0, le=MOST, description="Tokens without firing after which a latent counts as dead.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the initial parameters.")
    log_every: int = Field(65_536, gt=0, le=MOST, description="Tokens between two lines of log.jsonl.")

    @model_validator(mode="before")
    @classmethod
    def _of_older_files(cls, values: Any) -> Any:
        """Read the key target_hook of older files as `writes`."""
        if isinstance(values, dict) and "target_hook" in values:
            values = dict(values)
            target = values.pop("target_hook")
            return values if target is None else values | {"writes": (target,)}
        return values

    @model_validator(mode="after")
    def _names_hooks_once(self) -> "TrainConfig":
        if self.hook is not None and self.reads not in ((), (self.hook,)):
            raise ValueError(f"hook = {self.hook!r} and reads = {self.reads} contradict each other; leave out hook")
        for name in ("reads", "writes"):
            if len(set(hooks := getattr(self, name))) < len(hooks):
                raise ValueError(f"{name} names a hook twice")
        return self

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.lr if self.lr is not None else 2e-4 / (self.d_sae / 2**14) ** 0.5


class Origin(FrozenConfig):
    """Where the activations a dictionary was trained on come from."""

    model: str | None = Field(None, description="Model name, Hub id or folder.")
    revision: str | None = Field(None, description="Commit of the model.")
    model_class: str | None = Field(None, description="transformers class of the model.")
    processing: tuple[Literal["center_writing_weights"], ...] = Field(
        (), description="What was done to the weights when the model was loaded."
    )
    n_ctx: int | None = Field(None, ge=0, le=MOST, description="Tokens in a row.")
    prepend_bos: bool | None = Field(None, description="Whether each row begins with the BOS token.")
    text: str | None = Field(None, description="What the text was.")
    text_sha256: str | None = Field(None, description="SHA-256 of the token rows, where all of them are known.")
    excluded_positions: tuple[Annotated[int, Field(ge=0, le=MOST)], ...] = Field(
        (0,), description="Positions never trained on."
    )
    excluded_token_ids: tuple[Annotated[int, Field(ge=0, le=MOST)], ...] = Field(
        (), description="Token ids never trained on, in addition to the tokenizer's special tokens."
    )

    @model_validator(mode="before")
    @classmethod
    def _without_hooks(cls, values: Any) -> Any:
        """Leave out the hooks that older files have here, where they name none; ports name them now."""
        older = ("hook", "target_hook")
        return {k: v for k, v in values.items() if v is not None or k not in older} if isinstance(values, dict) else values


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    from saelens_lite.files import named_file, open_file  # torch comes with it, which settings by themselves do not need

    path = check_input(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such settings file")
    try:
        with open_file(named_file(path)) as file:
            content = file.read(MAX_TOML_BYTES + 1)
        if len(content) > MAX_TOML_BYTES:
            raise ValueError(f"more than {MAX_TOML_BYTES:,} bytes")
        return tomllib.loads(content.decode().replace("\r\n", "\n"))
    except CorruptFileError as error:
        raise ConfigError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from None


def train_configs(tables: dict[str, Any], overrides: dict[str, Any] | None = None) -> list[TrainConfig]:
    """Return the dictionaries a settings file asks for: shared keys at the top, one `[[dictionary]]` table each.

    Without any `[[dictionary]]` the top-level keys describe the only one. `overrides` win over both; `options` of the three
    are merged key by key.
    """
    shared = {key: value for key, value in tables.items() if key != "dictionary"}
    listed = tables.get("dictionary", [{}])
    if not isinstance(listed, list) or not all(isinstance(table, dict) for table in listed):
        raise ConfigError("dictionary: write each as a [[dictionary]] table, with double brackets")
    return [_merged(shared, table, overrides or {}) for table in listed]


def _merged(*layers: dict[str, Any]) -> TrainConfig:
    """Return the settings of several tables, later ones winning, `options` key by key."""
    options: dict[str, Any] = {}
    for layer in layers:
        given = layer.get("options", {})
        if not isinstance(given, dict):
            raise ConfigError(f"options = {given!r}: expected a table, such as options = {{k = 32}}")
        options |= given
    return TrainConfig(**{key: value for layer in layers for key, value in layer.items() if key != "options"}, options=options)


def parse_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options from a command line, where every value is a string: JSON where it is JSON ("32", "0.5", "true"), else
    text.
    """
    parsed = {}
    for key, value in options.items():
        try:
            parsed[key] = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            parsed[key] = value
    return parsed
