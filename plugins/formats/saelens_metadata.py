"""The part of SAELens's cfg.json that says where a dictionary belongs: model, hooks, rows, and tokens that do not count.

Since version 6 it is in `metadata`; before, it is at the top level. A file that does not say its version may have it in either
place.
"""

import logging
import re
from typing import Any

from saelens_lite import Origin
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import Settings, fill_layer, hook_of_module

CENTERED = "center_writing_weights"
HEADS = ("hook_head_index", "hook_point_head_index")
HEADS_OUT = ("hook_head_index_out", "hook_point_head_index_out")
OF_HEADS = re.compile(r"blocks\.\d+\.attn\.hook_[zqkv]")
PLACE = (  # settings that say where a dictionary belongs
    "model_name", "model_class_name", "model_from_pretrained_kwargs", "hook_name", "hook_name_out", "hook_point", "hook_layer",
    "hook_point_layer", "context_size", "prepend_bos", "dataset_path", "seqpos_slice", "exclude_special_tokens",
)  # fmt: skip
LOADING = {  # loading options of a model that do not change its activations, or that the origin records
    CENTERED, "revision", "dtype", "torch_dtype", "device", "n_devices", "device_map", "move_to_device", "trust_remote_code",
    "attn_implementation", "token", "cache_dir", "center_unembed", "low_cpu_mem_usage", "local_files_only",
}  # fmt: skip
MAX_EXCLUDED = 1 << 20


def metadata_of(config: Settings) -> tuple[Settings, bool]:
    """Return the settings in `metadata` and at the top level as one, and whether they are in the form from before version 6.

    If both places have a setting, the version decides. Without a version they must agree.
    """
    newer = config.part("metadata")
    version = config.text("sae_lens_version") or newer.text("sae_lens_version")
    is_old = "model_name" not in newer if version is None else not re.match(r"[6-9]|[1-9]\d", version)
    for key in PLACE if version is None else ():
        if key in config and key in newer and config.values[key] != newer.values[key]:
            said = f"{str(config.values[key])[:80]!r}, but metadata.{key} is {str(newer.values[key])[:80]!r}"
            raise CorruptFileError(f"{config.path}: {key} is {said}; remove the wrong one, or add metadata.sae_lens_version")
    first, second = (config, newer) if is_old else (newer, config)
    return Settings(config.path, {**second.values, **{k: v for k, v in first.values.items() if v is not None}}), is_old


def place_of(metadata: Settings, is_old: bool, transcoder: bool) -> dict[str, Any]:
    """Return the hooks and the origin, as fields of an Outline."""
    model = metadata.text("model_name")
    loading = metadata.part("model_from_pretrained_kwargs")
    old_default = is_old and "model_from_pretrained_kwargs" not in metadata and str(model).startswith("gpt2")
    _say_what_is_not_applied(loading)
    n_ctx = metadata.whole("context_size") if "context_size" in metadata else None
    origin = Origin(
        model={"gpt2-small": "gpt2"}.get(model, model),
        revision=loading.text("revision"),
        model_class=metadata.text("model_class_name"),
        processing=(CENTERED,) if loading.values.get(CENTERED) is True or old_default else (),
        n_ctx=n_ctx,
        prepend_bos=metadata.flag("prepend_bos") if "prepend_bos" in metadata else None,
        text=metadata.text("dataset_path"),
        excluded_positions=_excluded_positions(metadata, n_ctx),
        excluded_token_ids=_excluded_token_ids(metadata),
    )
    hook = _of_head(metadata, HEADS, _hook(metadata, "hook_name", "hook_point"))
    target = _of_head(metadata, HEADS_OUT, _hook(metadata, "hook_name_out") if transcoder else None)
    return {"origin": origin, "hook": hook, "target": target}


def _hook(metadata: Settings, *keys: str) -> str | None:
    """Return transformer-lens's name for the hook under the first of these keys."""
    name = next((name for name in map(metadata.text, keys) if name), None)
    if name is None or name.startswith(("blocks.", "hook_")):
        layer = next((metadata.whole(key) for key in ("hook_layer", "hook_point_layer") if key in metadata), None)
        return fill_layer(metadata.path, name, layer)
    return hook_of_module(name, model=metadata.text("model_name")) or name


def _of_head(metadata: Settings, keys: tuple[str, ...], hook: str | None) -> str | None:
    """Return the hook, with the number of the head that the settings choose.

    Raises:
        ConfigError: the hook has no heads.
    """
    key = next((key for key in keys if key in metadata), None)
    if key is None:
        return hook
    head = metadata.whole(key)
    if not OF_HEADS.fullmatch(hook or ""):
        raise ConfigError(
            f"{metadata.path}: {key} is {head}, but the hook {hook} is not one that has attention heads here (attn.hook_z, "
            "hook_q, hook_k, hook_v). Dictionary.from_tensors reads its tensors, for activations that you select yourself"
        )
    return f"{hook}.head_{head}"


def _excluded_positions(metadata: Settings, n_ctx: int | None) -> tuple[int, ...]:
    """Return the positions that `seqpos_slice` leaves out. SAELens trains on activations[:, slice(*seqpos_slice)]."""
    bounds: Any = metadata.values.get("seqpos_slice")
    if bounds is None:
        return ()
    if (
        not isinstance(bounds, list)
        or not 1 <= len(bounds) <= 3
        or not all(bound is None or type(bound) is int for bound in bounds)
    ):
        raise CorruptFileError(
            f"{metadata.path}: seqpos_slice is {str(bounds)[:80]}; expected up to three whole numbers or nulls"
        )
    kept = slice(*bounds)
    start, step = kept.start or 0, 1 if kept.step is None else kept.step
    if step < 1:
        raise CorruptFileError(f"{metadata.path}: seqpos_slice is {bounds}; its step must be at least 1")
    if n_ctx is None and (start < 0 or kept.stop is not None or step > 1):
        raise CorruptFileError(f"{metadata.path}: seqpos_slice is {bounds}, but context_size, on which it depends, is missing")
    row = range(start if n_ctx is None else n_ctx)
    trained_on = row[kept]
    if len(row) - len(trained_on) > MAX_EXCLUDED or (n_ctx is not None and not trained_on):
        raise CorruptFileError(
            f"{metadata.path}: seqpos_slice is {bounds}, which leaves {len(trained_on):,} of {len(row):,} positions"
        )
    if not trained_on:
        return tuple(row)
    first, end = trained_on[0], trained_on[-1] + 1
    between = (position for position in range(first, end) if position not in trained_on) if step > 1 else ()
    return (*row[:first], *between, *row[end:])


def _excluded_token_ids(metadata: Settings) -> tuple[int, ...]:
    """Return the token ids in `exclude_special_tokens`. true and false add none."""
    said: Any = metadata.values.get("exclude_special_tokens")
    if said is None or isinstance(said, bool):
        return ()
    if not isinstance(said, list) or not all(type(token) is int and token >= 0 for token in said):
        raise CorruptFileError(
            f"{metadata.path}: exclude_special_tokens is {str(said)[:80]}; expected true, false or token ids"
        )
    return tuple(sorted(set(said)))


def _say_what_is_not_applied(loading: Settings) -> None:
    """Warn about loading options that may change the model's activations from those of `load_model`."""
    others = {key: value for key, value in loading.values.items() if key not in LOADING and value not in (None, False)}
    if others:
        logging.getLogger(__name__).warning(
            "%s: the model was loaded with %s, which load_model does not apply; its activations may differ",
            loading.path,
            ", ".join(f"{str(key)[:40]} = {str(value)[:40]}" for key, value in sorted(others.items())[:8]),
        )
