"""Qwen-Scope: layerN.sae.pt, a pickle for each layer, and one config.json.

    h = x W_encᵀ + b_enc        codes = the k largest of h        y = codes W_decᵀ + b_dec

b_dec is not subtracted from x. The tool would keep negative entries of h if fewer than k were positive; here, as in SAELens,
they are dropped. The layer is in the file's name. Without config.json, the name of the repository tells the model and k.
"""

from pathlib import Path

from saelens_lite import Dictionary, Origin
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import Format, Known, Outline, Settings, TorchFile, match_in_path, strings_in_pickle

NAMES = {
    "W_enc": ("W_enc", "d_sae d_in"),
    "b_enc": ("b_enc", "d_sae"),
    "W_dec": ("W_dec", "d_out d_sae"),
    "b_dec": ("b_dec", "d_out"),
}
FILE = r"layer(\d+)\.sae\.pt$"
REPOSITORY = r"SAE-Res-(Qwen.+)-W\d+K-L0_(\d+)$"
TYPE = "topk_sae"


class QwenScope(Format):
    """Qwen-Scope's layerN.sae.pt files; read (only on request, because they are pickles)."""

    pickled = True

    def detect(self, path: Path) -> bool:
        held = strings_in_pickle(path) if path.is_file() else set()
        if not held >= NAMES.keys() or "threshold" in held:
            return False
        try:
            return _settings(path).text("model_type") == TYPE or bool(match_in_path(path, FILE))
        except CorruptFileError:
            return bool(match_in_path(path, FILE))

    def outline(self, path: Path) -> Outline:
        return self._outline(path, None)

    def read(self, path: Path, known: Known | None = None) -> Dictionary:
        known = known or Known()
        return self._outline(path, known.k).knowing(known).build(self.plugin_name)

    def _outline(self, path: Path, k: int | None) -> Outline:
        """Return the description of a file. `k` counts if the settings do not state it."""
        config = _settings(path)
        if (kind := config.text("model_type", TYPE)) != TYPE:
            raise ConfigError(f"{config.path}: model_type {kind!r} is not supported; supported is {TYPE}")
        if (point := config.text("hook_point", "resid_post")) != "resid_post":
            raise ConfigError(f"{config.path}: hook_point {point!r} is not supported; supported is resid_post")
        layer, repository = match_in_path(path, FILE), match_in_path(path, REPOSITORY)
        k = config.whole("k") if "k" in config else k or (int(repository[2]) if repository else None)
        if k is None:
            raise ConfigError(
                f"{path}: no file says k, the number of codes of a token; put the repository's config.json beside it, or name "
                "its folder like the repository, such as SAE-Res-Qwen3-8B-Base-W64K-L0_50"
            )
        model = config.text("base_model") or (f"Qwen/{repository[1]}" if repository else None)
        return Outline(
            TorchFile(path),
            "topk",
            NAMES,
            options={"k": k},
            hook=f"blocks.{int(layer[1])}.hook_resid_post" if layer else None,
            origin=Origin(model=model, excluded_positions=()),
            subtracts_b_dec=False,
            sizes=config.sizes(d_in="d_model", d_sae="d_sae"),
            config=config.values,
            architecture=TYPE,
        )


def _settings(path: Path) -> Settings:
    """Return the settings beside a file; empty if there are no settings."""
    config = path.parent / "config.json"
    return Settings.read(config) if config.is_file() else Settings(config, {})
