"""circuit-tracer: config.yaml, and a file for each layer's transcoder.

    codes = act(x W_encᵀ + b_enc)        y = codes W_dec + b_dec + x W_skipᵀ

W_enc stands in the file as [d_sae d_in]. circuit-tracer wants all layers from 0 on: put the layer files of several dictionaries
of one kind into one folder.
"""

import json
import logging
import re
from pathlib import Path

from saelens_lite import Dictionary
from saelens_lite.formats import Format, cannot_write, write_tensors, write_text

ACTIVATIONS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}


class CircuitTracer(Format):
    """circuit-tracer's transcoders, a file for each layer; written."""

    def write(self, dictionary: Dictionary, folder: Path) -> None:
        form = dictionary.rule.inference_form()
        place = re.fullmatch(r"blocks\.(\d+)\.(.+)", dictionary.origin.hook or "")
        target = re.fullmatch(r"blocks\.(\d+)\.(.+)", dictionary.origin.target_hook or "")
        if not dictionary.is_transcoder or dictionary.d_in != dictionary.d_out:
            raise cannot_write(dictionary, self.plugin_name, "it reads transcoders whose output is as wide as their input")
        if form is None or form.architecture not in ACTIVATIONS:
            raise cannot_write(dictionary, self.plugin_name, f"its codes are {', '.join(ACTIVATIONS.values())} only")
        if not place or not target or place[1] != target[1]:
            raise cannot_write(dictionary, self.plugin_name, "hook and target_hook of one layer, blocks.<i>.…, are needed")
        activation = ACTIVATIONS[form.architecture]
        config = {
            "model_kind": "transcoder_set",
            "model_name": dictionary.origin.model,
            "feature_input_hook": place[2],
            "feature_output_hook": target[2],
            "scan": None,
            "activation": activation,
        }
        tensors = {"W_enc": dictionary.W_enc.T, "W_dec": dictionary.W_dec, "b_enc": dictionary.b_enc, "b_dec": dictionary.b_dec}
        if dictionary.W_skip is not None:
            tensors["W_skip"] = dictionary.W_skip
        if activation == "jumprelu":
            tensors["activation_function.threshold"] = form.tensors["threshold"]
        if activation == "topk":
            config["k"] = form.settings["k"]
            logging.getLogger(__name__).warning(
                "circuit-tracer keeps negative codes where fewer than k = %d pre-activations are positive; here they are 0",
                config["k"],
            )
        write_tensors(folder / f"layer_{place[1]}.safetensors", tensors)
        write_text(folder / "config.yaml", "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items()))
