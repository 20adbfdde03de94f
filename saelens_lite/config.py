"""Settings: frozen and validated, with a sentence on each field.

A settings object is data: no I/O, no ids, no devices. An unknown key is an error that names the nearest known one.
"""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from saelens_lite.errors import ConfigError, CorruptFileError, near_matches
from saelens_lite.files import named_file, open_file
from saelens_lite.paths import check_input

MOST = 2**53  # the largest whole number in settings
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
    """Return one line for a validation error: each invalid key, its value and the values that are allowed."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = f"; the keys are {', '.join(config.model_fields)}" if config.model_fields else "; there are no keys"
            lines.append(f"unknown key {key!r}{_other_place(key, config) or near_matches(key, config.model_fields) or known}")
        elif item["type"] == "missing":
            lines.append(f"{key!r} is required")
        elif not key:  # of a validator of the whole
            lines.append(str(item.get("ctx", {}).get("error", item["msg"])))
        else:
            lines.append(f"{key} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return f"{config.__qualname__.replace('.Config', '')}: {'; '.join(lines)}"


def _other_place(key: str, config: type[BaseModel]) -> str:
    """Return the end of a message that says where a key belongs if it is not a setting of a dictionary; "" if nowhere."""
    if config is TrainConfig and key in OF_THE_RUN:
        return "; it is a setting of the whole run, not of a dictionary"
    if config is not TrainConfig or near_matches(key, config.model_fields):
        return ""
    return f"; options of the sparsity rule are written options = {{{key} = …}} in a file, options={{{key!r}: …}} in Python"


class TextConfig(FrozenConfig):
    """Settings for reading text and cutting it into token rows."""

    column: str = Field("text", description="Column or key that holds the text, in .csv, .jsonl, .parquet and datasets.")
    token_column: str | None = Field(None, description="Column or key that holds token ids. They are read in place of text.")
    split: str | None = Field(None, description="Split of a dataset; default: train.")
    n_ctx: int | None = Field(
        None,
        description="Tokens in a row, BOS included; default: the model's context, up to 1,024.",
    )
    bos: Literal["row", "document", "none"] = Field(
        "row", description="Position of BOS: at the start of every row, before every document, or nowhere."
    )
    pack: bool = Field(
        False,
        description="Fill rows with one document after another and a separator between them. Only the last row is padded.",
    )
    separator: Literal["eos", "bos"] = Field("eos", description="Token between two documents of a packed row.")
    min_context: int = Field(
        0,
        ge=0,
        description="When a row continues a document, repeat this many of its tokens at the start. They count only once.",
    )
    truncate: bool = Field(False, description="Read only the part of each document that fits into one row.")
    exclude_positions: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), description="Positions of a row to leave out; by default the first, whose norm is an outlier."
    )
    exclude_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="Token ids to leave out, in addition to the tokenizer's special tokens."
    )
    exclude_template: bool = Field(
        False,
        description="Leave out the tokens that the tokenizer's chat template puts around messages, such as role names.",
    )
    max_token_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Largest share of the counted positions that one token id may have. Surplus positions are left out.",
    )

    @model_serializer(mode="wrap", when_used="json")
    def _without_later_keys(self, serialize: Any) -> dict[str, Any]:
        """Leave out exclude_template unless it is set, as older versions do, which refuse unknown keys."""
        return {k: v for k, v in serialize(self).items() if k != "exclude_template" or v}


class StoreConfig(FrozenConfig):
    """Settings of a feature store: how much text is read, and what is kept of each latent."""

    n_tokens: int | None = Field(None, ge=1, description="Tokens to read; default: all.")
    batch_tokens: int | None = Field(
        None, ge=1, description="Tokens in a forward pass; default: 2,048 on a CPU and 16,384 on a GPU."
    )
    top_n: int = Field(
        10, gt=0, le=MOST, description="Contexts in which a latent fires most, each from another row; of equals, the earlier."
    )
    n_groups: int = Field(5, gt=0, le=MOST, description="Groups of equally many of a latent's activations, by size.")
    group_size: int = Field(5, gt=0, le=MOST, description="Contexts drawn from each group.")
    n_random: int = Field(10, gt=0, le=MOST, description="Contexts drawn from all activations of a latent.")
    n_silent: int = Field(20, gt=0, le=MOST, description="Contexts drawn from places where a latent does not fire.")
    window: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(
        (12, 6), description="Tokens shown before and after."
    )
    codes: bool = Field(
        False, description="Keep all activations in the folder of the store as a Parquet table, for queries in SQL."
    )
    control: bool = Field(False, description="Collect the same on the model with its weights shuffled.")
    raw_unembedding: bool = Field(False, description="Leave the final norm's scale out of effects on logits.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of what is drawn.")


class TrainConfig(FrozenConfig):
    """Settings of one dictionary to train. Horizons are in tokens."""

    hook: str | None = Field(
        None,
        description="Hook to read and write; of several models, a key such as chat:blocks.2.hook_resid_pre, or "
        "chat-base:blocks.2.hook_resid_pre for the difference. May be left out when the cache holds only one; one hook of "
        "several models then makes a crosscoder.",
    )
    reads: tuple[str, ...] = Field(
        (), description="Hooks or keys to read, in place of `hook`. Several make a crosscoder, of layers or of models."
    )
    writes: tuple[str, ...] = Field(
        (), description="Hooks or keys to predict; default: those that are read. Another hook makes a transcoder."
    )
    skip: bool = Field(
        False, description="Add a linear map from input to output. Only for dictionaries that write to other hooks."
    )
    sparsity: str = Field("topk", description="Sparsity rule: the name of a plugin (see `saelens-lite plugins`).")
    options: dict[str, Any] = Field({}, description="Options of the sparsity rule, e.g. --options.k 32.")
    d_sae: int = Field(2048, gt=0, le=MOST, description="Number of latents.")
    n_tokens: int = Field(1_000_000, gt=0, le=MOST, description="Activations to train on. Shorter data is read again.")
    batch_size: int = Field(
        default_factory=lambda settings: usual_batch_size(settings.get("n_tokens", 0)),
        gt=0,
        le=MOST,
        description="Activations per optimiser step; default: 2,048, or less if the training would have fewer than 500 steps.",
    )
    lr: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of Adam; default: 0.05 / sqrt(d_in) * (2048 / d_sae)**(1/4), times "
        "sqrt(800 / steps) if there are more than 800 steps, and at most 0.01; l1 and p_anneal multiply it by "
        "sqrt(batch_size / 256), 0.7 to 3.",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="Decay rates of Adam's first and second moment."
    )
    warmup: float = Field(0.02, ge=0, le=1, description="Share of the tokens over which the learning rate rises linearly.")
    decay: float = Field(
        0.2, ge=0, le=1, description="Share of the tokens, at the end, over which the learning rate falls to 0."
    )
    sparsity_warmup: float = Field(
        0.1, ge=0, le=1, description="Share of the tokens over which sparsity penalties rise linearly."
    )
    clip_grad_norm: float = Field(1.0, ge=0, description="Largest norm of the whole gradient. 0 turns clipping off.")
    normalize: Literal["sqrt_d", "none"] = Field(
        "sqrt_d",
        description="Scale activations in training so that their RMS norm is sqrt(d_in). Transcoders subtract the input "
        "mean first. The scale is folded into the weights on saving.",
    )
    encoder_precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Number type of the pre-activations from which the firing latents are chosen. Codes and gradients are "
        "float32; with bfloat16, products of large supports on a GPU round their factors. auto means bfloat16 on a CUDA device "
        "and float32 elsewhere.",
    )
    dead_after: int = Field(200_000, gt=0, le=MOST, description="Tokens without firing after which a latent counts as dead.")
    kl_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the tokens, at the end, in which the loss also has KL(model ‖ model with the reconstruction in "
        "place of the activations); begins with the nearest batch, with the last at the latest. Needs a text and its model; a "
        "cache holds no token rows. 0.1 is usual.",
    )
    kl_coefficient: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="With kl_share: weight of KL relative to the squared error, after each step has scaled KL to the size of "
        "the squared error. Their weighted mean takes the place of the squared error.",
    )
    kl_lr: float = Field(
        0.3,
        gt=0,
        le=10,
        description="With kl_share: learning rate relative to the schedule, since batches of whole rows vary more.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the initial parameters.")
    log_every: int = Field(65_536, gt=0, le=MOST, description="Tokens between two log lines.")

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

    @model_validator(mode="after")
    def _uses_settings_of_kl(self) -> "TrainConfig":
        """Refuse settings of KL that would do nothing. An explicit kl_share = 0 turns KL off, with all of them."""
        given = [name for name in ("kl_coefficient", "kl_lr") if name in self.model_fields_set]
        if given and "kl_share" not in self.model_fields_set:
            raise ValueError(f"{' and '.join(given)} without kl_share, the share of the tokens with KL; give that too")
        return self

    @model_serializer(mode="wrap", when_used="json")
    def _without_later_keys(self, serialize: Any) -> dict[str, Any]:
        """Leave out the settings of KL unless kl_share is set, as older versions do, which refuse unknown keys."""
        return {k: v for k, v in serialize(self).items() if self.kl_share or not k.startswith("kl_")}

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks that are named, to read and to write."""
        return (*(self.reads or ((self.hook,) if self.hook else ())), *self.writes)

    @property
    def n_steps(self) -> int:
        """The number of optimiser steps."""
        return -(-self.n_tokens // self.batch_size)

    def peak_lr(self, d_in: int, factor: float = 1.0) -> float:
        """Return the learning rate after warm-up. The default was fitted to short trainings of several widths and rules.

        factor: that of the rule, `Sparsity.lr_factor`.
        """
        usual = factor * 0.05 * d_in**-0.5 * (2048 / self.d_sae) ** 0.25 * min(1.0, (800 / self.n_steps) ** 0.5)
        return self.lr if self.lr is not None else min(usual, 0.01)


def usual_batch_size(n_tokens: int) -> int:
    """Return the default batch size: a power of 2, 64 to 2,048, that gives a training at least 500 steps if it can."""
    return 2 ** min(11, max(6, (n_tokens // 500).bit_length() - 1))


class RunConfig(FrozenConfig):
    """Settings of a training run that its dictionaries share: the data, the folder and the loop."""

    cache: str | None = Field(None, description="Folder that `capture` wrote.")
    text: str | None = Field(
        None, description="Text to read in place of a cache, as for `capture`. Activations are computed during training."
    )
    model: str = Field("tiny", description='With --text: "tiny", a Hugging Face Hub id, or a folder.')
    model_dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto",
        description="With --text: number type of the model. auto is float32, but on CUDA the checkpoint's own; float32 "
        "checkpoints then have TF32 products, which float32 turns off.",
    )
    device_map: Literal["auto", "tp"] | None = Field(
        None,
        description="With --text, for models larger than a device: auto spreads the model over GPUs, memory and disk; tp cuts "
        "it into a part for each process.",
    )
    model_revision: str | None = Field(None, description="With --text: commit, branch or tag of the model on the Hub.")
    center_writing_weights: bool = Field(
        False, description="With --text: subtract the mean from the weights that write to the residual stream."
    )
    buffer_tokens: int = Field(
        65_536, gt=0, le=MOST, description="With --text: number of activations per hook that are shuffled in memory."
    )
    start_from: tuple[str, ...] = Field(
        (),
        description="Dictionary whose parameters training starts from; with several dictionaries to train, one for all, or one "
        "for each. It also supplies the settings that are not given: rule, options and hooks.",
    )
    out: str = Field("runs/dictionary", description="Folder for the run.")
    exists: Literal["error", "overwrite"] = Field(
        "error", description="If the folder is not empty: stop with an error, or overwrite it."
    )
    data_seed: int = Field(0, ge=0, lt=2**32, description="Seed of the order of the data.")
    validation_tokens: int = Field(
        0, ge=0, le=MOST, description="Number of activations held out from training, for val_fvu and val_l0 in the log."
    )
    checkpoint_seconds: float = Field(600.0, ge=0, description="Seconds between checkpoints.")
    device: str | None = Field(
        None,
        description="Device to train on, e.g. cuda; default: CUDA if available, else MPS if it works, else the CPU. With "
        "--resume, the default is the device of the run.",
    )
    parallel: Literal["auto", "sweep", "latents", "data"] = Field(
        "auto",
        description="With several devices: sweep (each trains some of the dictionaries), latents (each holds some latents of a "
        "dictionary), or data (each reads some rows of a batch). auto is the first of these that is possible.",
    )
    loggers: tuple[str, ...] = Field(
        ("jsonl",),
        description="Loggers, comma-separated: jsonl (log.jsonl in the run folder), tensorboard, wandb, trackio, or your own "
        "plugin.",
    )

    @field_validator("loggers", mode="before")
    @classmethod
    def _split(cls, names: Any) -> Any:
        """Split names at commas."""
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
            return listed
        return tuple(part.strip() for name in listed for part in name.split(",") if part.strip())


class ModelFacts(FrozenConfig):
    """One of the models that a dictionary of several models reads; fields as in `Origin`."""

    name: str = Field(max_length=100, description="Name of the model in ports, such as base.")
    model: str | None = Field(None, description="Model name, Hub id or folder.")
    revision: str | None = Field(None, description="Commit of the model.")
    model_class: str | None = Field(None, description="transformers class of the model.")
    processing: tuple[Literal["center_writing_weights"], ...] = Field((), description="Changes made to the weights.")
    precision: str | None = Field(None, max_length=40, description="Number type of the forward passes; None: float32.")


class Origin(FrozenConfig):
    """The source of the activations that a dictionary was trained on.

    If a dictionary reads several models, `models` has the facts about each, and those here about a model are unset.
    """

    model: str | None = Field(None, description="Model name, Hub id or folder.")
    revision: str | None = Field(None, description="Commit of the model.")
    model_class: str | None = Field(None, description="transformers class of the model.")
    processing: tuple[Literal["center_writing_weights"], ...] = Field(
        (), description="Changes made to the weights when the model was loaded."
    )
    precision: str | None = Field(
        None,
        max_length=40,
        description="Number type of the model's forward passes, such as bfloat16; tf32 is float32 with TF32 products. None: "
        "float32, or unknown.",
    )
    n_ctx: int | None = Field(None, ge=0, le=MOST, description="Tokens in a row.")
    prepend_bos: bool | None = Field(None, description="True if each row begins with the BOS token.")
    text: str | None = Field(None, description="Description of the text.")
    text_sha256: str | None = Field(None, description="SHA-256 of the token rows, if all of them are known.")
    excluded_positions: tuple[Annotated[int, Field(ge=0, le=MOST)], ...] = Field(
        (0,), description="Positions never trained on."
    )
    excluded_token_ids: tuple[Annotated[int, Field(ge=0, le=MOST)], ...] = Field(
        (), description="Token ids never trained on, in addition to the tokenizer's special tokens."
    )
    excluded_template: bool = Field(False, description="True if the tokens of the chat template were never trained on.")
    models: tuple[ModelFacts, ...] = Field((), max_length=100, description="The models, if the dictionary reads several.")

    def of(self, name: str | None) -> "Origin":
        """Return the origin of the activations of one of several models; the origin itself if there is one model."""
        for facts in self.models:
            if facts.name == name:
                return self.replace(**facts.model_dump(exclude={"name"}), models=())
        return self

    def among(self, names: set[str | None]) -> "Origin":
        """Return the origin with the facts about some of its models only; the origin itself if none of them is named."""
        named = tuple(facts for facts in self.models if facts.name in names)
        return self.replace(models=named) if named and named != self.models else self

    @property
    def of_each(self) -> dict[str | None, "Origin"]:
        """The origin of the activations of each of several models, by name; of a single model, the name is None."""
        return {facts.name: self.of(facts.name) for facts in self.models} or {None: self}

    @model_validator(mode="before")
    @classmethod
    def _without_hooks(cls, values: Any) -> Any:
        """Drop the empty hook fields of older files. Ports name the hooks now."""
        older = ("hook", "target_hook")
        return {k: v for k, v in values.items() if v is not None or k not in older} if isinstance(values, dict) else values

    @model_serializer(mode="wrap")
    def _with_known_precision(self, serialize: Any) -> dict[str, Any]:
        """Leave out later keys that are not set, as older versions do, which refuse unknown keys."""
        return {k: v for k, v in serialize(self).items() if k not in ("precision", "excluded_template", "models") or v}


OF_THE_RUN = {*RunConfig.model_fields, *TextConfig.model_fields}  # keys that the dictionaries of a run share


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
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
    """Return the settings of the dictionaries in a settings file: shared keys at the top, then one `[[dictionary]]` table each.

    Without a `[[dictionary]]` table, the top-level keys describe one dictionary. `overrides` override both. The three `options`
    tables are merged key by key. `settings_file.run_config` reads the keys of the run and of its text.
    """
    shared = {key: value for key, value in tables.items() if key != "dictionary" and key not in OF_THE_RUN}
    listed = tables.get("dictionary", [{}])
    if not isinstance(listed, list) or not all(isinstance(table, dict) for table in listed):
        raise ConfigError("dictionary: write each as a [[dictionary]] table, with double brackets")
    for table in listed:
        for key in table:
            if key in OF_THE_RUN:
                raise ConfigError(f"{key} is a setting of the whole run; write it above the first [[dictionary]]")
    return [_merged(shared, table, overrides or {}) for table in listed]


def _merged(*layers: dict[str, Any]) -> TrainConfig:
    """Merge several tables of settings. Later tables override earlier ones; `options` merge key by key."""
    options: dict[str, Any] = {}
    for layer in layers:
        given = layer.get("options", {})
        if not isinstance(given, dict):
            raise ConfigError(f"options = {given!r}: expected a table, such as options = {{k = 32}}")
        options |= given
    return TrainConfig(**{key: value for layer in layers for key, value in layer.items() if key != "options"}, options=options)


def parse_options(options: dict[str, Any]) -> dict[str, Any]:
    """Parse the options of a command line. Values that are JSON ("32", "0.5", "true") are decoded; others stay text.

    Dashes in names count as underscores.
    """
    return {key.replace("-", "_"): _parsed(value) for key, value in options.items()}


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
