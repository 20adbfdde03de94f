"""Attention dictionaries of Kissane, Krzyzanowski and Conmy: NAME.pt, a pickle, and NAME_cfg.json beside it.

    h = (x − b_dec) W_enc + b_enc        codes = ReLU(h)        y = codes W_dec + b_dec

The files are not in folders of their own. x is hook_z of all heads, joined. transformer-lens's default processing, with which
their models are usually loaded, moves the biases of values into b_O: there, x is without these biases. If the model has such
biases, as GPT-2 has, they must be subtracted from x first and added to y.
"""

import logging
from pathlib import Path

from saelens_lite import Origin
from saelens_lite.errors import ConfigError
from saelens_lite.formats import PLAIN, Format, Outline, Settings, TorchFile, strings_in_pickle


class HookZ(Format):
    """Kissane, Krzyzanowski and Conmy's NAME.pt and NAME_cfg.json; read (only on request, because they are pickles)."""

    pickled = True

    def detect(self, path: Path) -> bool:
        return path.is_file() and _settings(path).is_file() and PLAIN.keys() <= strings_in_pickle(path)

    def outline(self, path: Path) -> Outline:
        if not path.is_file() or not _settings(path).is_file():
            raise ConfigError(
                f"{path}: a hook_z dictionary is a file NAME.pt with its settings beside it, {_settings(path).name}"
            )
        config, file = Settings.read(_settings(path)), TorchFile(path)
        hook = config.text("act_name")
        if hook is not None and hook.endswith("hook_z"):
            logging.getLogger(__name__).warning(
                "%s: such dictionaries are usually used with transformer-lens's default processing, which moves value biases "
                "out of %s. If the model has such biases, as GPT-2 has, its own activations differ from these by them",
                path,
                hook,
            )
        model = config.text("model_name")
        return Outline(
            file,
            "l1",
            PLAIN,
            hook=hook,
            origin=Origin(
                model={"gpt2-small": "gpt2"}.get(model, model),
                processing=("center_writing_weights",) if str(model).startswith("gpt2") else (),
                n_ctx=config.whole("seq_len") if "seq_len" in config else None,
                prepend_bos=True,
                excluded_positions=(),
            ),
            sizes=config.sizes(d_in="act_size", d_sae="dict_size"),
            config=config.values,
            architecture="ReLU",
        )


def _settings(path: Path) -> Path:
    return path.with_name(f"{path.stem}_cfg.json")
