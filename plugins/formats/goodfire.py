"""Goodfire, and qresearch's autoencoders of DeepSeek-R1: one .pt or .pth file, a pickle, of two linear layers.

    codes = relu(x encoderᵀ + b_enc)        y = codes decoderᵀ + b_dec

The files have no settings. Names such as Llama-3.1-8B-Instruct-SAE-l19 say the model and the layer. Goodfire reads the output
of that layer. qresearch's own notebook reads the input of that layer, although SAELens lists its output.
"""

from pathlib import Path
from typing import ClassVar

from saelens_lite import Origin
from saelens_lite.errors import ConfigError
from saelens_lite.formats import Format, Outline, TorchFile, match_in_path, strings_in_pickle

OWNERS = {"Llama": "meta-llama", "DeepSeek": "deepseek-ai"}  # of models on the Hub, by the beginning of the model's name
NAME = rf"(?:(({'|'.join(OWNERS)})-[\w.-]+?)-)?SAE-l(\d+)"
TIED = frozenset({"W", "b_enc", "b_dec"})  # Goodfire's batch top-k dictionaries of DeepSeek-R1


class Goodfire(Format):
    """Goodfire's .pt and .pth files; read (only on request, because they are pickles)."""

    pickled = True
    layers: ClassVar[tuple[str, str]] = ("encoder_linear", "decoder_linear")
    hook: ClassVar[str] = "blocks.{}.hook_resid_post"

    def detect(self, path: Path) -> bool:
        held = strings_in_pickle(path) if path.is_file() else set()
        return held >= self._names() or (held >= TIED and "W_dec" not in held)

    def outline(self, path: Path) -> Outline:
        file = TorchFile(path)
        if file.specs.keys() == TIED:
            raise ConfigError(
                f"{path}: codes by batch top-k depend on the rest of their batch, and the file has no threshold; to use the k "
                "largest of each token instead, read its tensors and pass them to Dictionary.from_tensors with rule='topk'"
            )
        match = match_in_path(path, NAME)
        encoder, decoder = self.layers
        return Outline(
            file,
            "l1",
            {
                "W_enc": (f"{encoder}.weight", "d_sae d_in"),
                "b_enc": (f"{encoder}.bias", "d_sae"),
                "W_dec": (f"{decoder}.weight", "d_out d_sae"),
                "b_dec": (f"{decoder}.bias", "d_out"),
            },
            hook=self.hook.format(int(match[3])) if match else None,
            origin=Origin(model=f"{OWNERS[match[2]]}/{match[1]}" if match and match[1] else None, excluded_positions=()),
            subtracts_b_dec=False,
            config=file.values,
            architecture="ReLU",
        )

    def _names(self) -> set[str]:
        return {f"{layer}.{part}" for layer in self.layers for part in ("weight", "bias")}


class DeepSeekR1(Goodfire):
    """qresearch's .pt files; read (only on request, because they are pickles)."""

    layers = ("encoder", "decoder")
    hook = "blocks.{}.hook_resid_pre"

    def detect(self, path: Path) -> bool:
        if not path.is_file() or match_in_path(path, r"DeepSeek-[\w.-]+-SAE-l\d+") is None:  # other pairs of layers are alike
            return False
        if (path.parent / "config.json").is_file():  # with settings, it is dictionary_learning's
            return False
        held = strings_in_pickle(path)
        return held >= self._names() and "latent_bias" not in held
