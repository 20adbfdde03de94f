"""Gemma Scope: params.npz (first release), or params.safetensors and config.json (second release).

    codes = ReLU(h) · 1[h > threshold],   h = x W_enc + b_enc        y = codes W_dec + b_dec + x A

The files hold A, affine_skip_connection, as [d_in d_out]. Files of the first release name neither their model nor whether they
are transcoders; the equation is the same for both.
"""

import logging
from pathlib import Path

from saelens_lite import Origin
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.formats import Format, Outline, Settings, find_file, hook_of_module, is_zip, open_tensors, tensor_names

FILES = ("params.npz", "params.safetensors")
FIRST = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
SECOND = {name.lower() for name in FIRST}
SKIP = "affine_skip_connection"


class GemmaScope(Format):
    """Google DeepMind's JumpReLU dictionaries of Gemma, first and second release; read."""

    def detect(self, path: Path) -> bool:
        file = find_file(path, *FILES)
        names = tensor_names(file) - {SKIP} if file else set()
        is_ours = names == SECOND or (names == FIRST and is_zip(file))
        return is_ours or (file is not None and file.name in FILES and max(len(names & FIRST), len(names & SECOND)) > 2)

    def outline(self, path: Path) -> Outline:
        file = open_tensors(find_file(path, *FILES) or path / FILES[0])
        W = "w" if file.specs.keys() & {"w_enc", "w_dec"} else "W"
        settings = file.path.parent / "config.json"
        config = Settings.read(settings) if W == "w" and settings.is_file() else Settings(settings, {})
        kind, architecture = config.text("type"), config.text("architecture", "jump_relu")
        if file.ndim(f"{W}_dec") == 3 or kind in ("clt", "crosscoder"):
            raise ConfigError(f"{file.path}: a {kind or 'transcoder'} that reads or writes several layers is not supported")
        if kind not in (None, "sae", "transcoder") or architecture not in ("jump_relu", "jumprelu"):
            raise ConfigError(
                f"{config.path}: type {kind!r} with architecture {architecture!r}; only sae and transcoder with jump_relu work"
            )
        if config.flag("affine_connection") and SKIP not in file.specs:
            raise CorruptFileError(f"{file.path}: affine_connection is true, but tensor {SKIP!r} is missing")
        inside, outside = config.text("hf_hook_point_in"), config.text("hf_hook_point_out")
        transcoder = SKIP in file.specs or kind == "transcoder" or (outside is not None and outside != inside)
        if kind == "sae" and transcoder:
            raise CorruptFileError(
                f"{config.path}: type is 'sae', but it has a skip connection, or hf_hook_point_out is not hf_hook_point_in"
            )
        return Outline(
            file,
            "jumprelu",
            {
                "W_enc": (f"{W}_enc", "d_in d_sae"),
                "b_enc": ("b_enc", "d_sae"),
                "W_dec": (f"{W}_dec", "d_sae d_out"),
                "b_dec": ("b_dec", "d_out"),
                "rule.plain_threshold": ("threshold", "d_sae"),
                **({"W_skip": (SKIP, "d_in d_out")} if SKIP in file.specs else {}),
            },
            options={"parameter": "plain"},
            hook=_hook(inside, config.text("model_name")),
            target=_hook(outside, config.text("model_name")) if transcoder else None,
            origin=Origin(model=config.text("model_name"), prepend_bos=True, excluded_positions=()),
            transcoder=transcoder,
            subtracts_b_dec=False,
            config=config.values,
            architecture=architecture,
        )


def _hook(point: str | None, model: str | None) -> str | None:
    """Return transformer-lens's name for a hook such as "model.layers.3.output", or log that it is unknown and return None."""
    module, _, side = (point or "").rpartition(".")
    hook = hook_of_module(module, side, model) if side in ("input", "output") else None
    if point is not None and hook is None:
        logging.getLogger(__name__).warning("no hook is known for %s; the dictionary's origin names none", point[:80])
    return hook
