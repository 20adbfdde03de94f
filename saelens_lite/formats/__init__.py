"""Read and write other formats: load the dictionaries of other tools, save ours for them, and define a format of your own.

`sl.load` and `saelens-lite inspect` recognise other tools' dictionaries by the content of the files. Scales and means are
folded into the weights, so that the dictionaries take raw activations. Settings that affect the codes, the reconstruction, the
hook or the tokens that count are translated, or refused with an error.

```python
sl.convert("my-dictionary", "converted", format="sparsify")  # or saelens, dictionary_learning, circuit_tracer
```

```sh
saelens-lite convert runs/topk/dictionary out --format sparsify
saelens-lite inspect runs/topk/dictionary
```

If a format cannot hold a dictionary, writing raises an error that says what would be lost. Pickles (dictionary_learning,
OpenAI, Qwen-Scope, Goodfire, hook_z, …) are read only on request (`format="openai"`), and only their tensors.

Facts that files do not state are arguments of `load`. Crosscoders of two models name neither their hook nor their models, and
the files of ckkissane lack the factors of the activations:

    sl.load("gemma-2-2b-L13-k100", hook="blocks.13.hook_resid_post", models={"base": "google/gemma-2-2b", "chat": None})
    sl.load("SAE-difference", hook="chat-base:blocks.13.hook_resid_post")
    sl.load("blocks.14.hook_resid_pre", format="crosscoder_model_diff", scale=(0.2759, 0.2442))

**Tensors of your own.** A torch state dict in either orientation, arrays of numpy or jax, and lists become a dictionary by
`sl.Dictionary.from_tensors`. Sizes decide which axis is which; if they do not, an error says what to add.

```python
import numpy as np, torch
W_enc, b_enc, W_dec, b_dec = torch.randn(16, 64), torch.randn(64), torch.randn(64, 16), torch.randn(16)

own = sl.Dictionary.from_tensors(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, rule="topk", options={"k": 8})

layers = torch.nn.ModuleDict({"encoder": torch.nn.Linear(16, 64), "decoder": torch.nn.Linear(64, 16)}).state_dict()
own = sl.Dictionary.from_tensors(
    W_enc=layers["encoder.weight"], b_enc=layers["encoder.bias"], W_dec=layers["decoder.weight"], b_dec=layers["decoder.bias"],
    subtract_b_dec=False,  # h = x W_enc + b_enc
)

arrays = {"W_enc": W_enc.numpy(), "b_enc": b_enc.numpy(), "W_dec": W_dec.numpy(), "threshold": np.full(64, 0.5)}
own = sl.Dictionary.from_tensors(**arrays, rule="jumprelu", mean=x.mean(0), scale=0.5, hook="blocks.1.hook_resid_pre")
```

If the code of the other tool is at hand, `sl.Dictionary.from_module(module, x)` finds out what it does with its tensors, and
returns the dictionary only if it reproduces the module's own output on activations x.

```python
class TheirModule(torch.nn.Module):  # such as OpenAI's
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(16, 64, bias=False), torch.nn.Linear(64, 16, bias=False)
        self.pre_bias, self.latent_bias, self.k = torch.nn.Parameter(b_dec), torch.nn.Parameter(b_enc), 8

    def forward(self, x):
        top = (self.encoder(x - self.pre_bias) + self.latent_bias).relu().topk(self.k)
        codes = torch.zeros(len(x), 64).scatter(1, top.indices, top.values)
        return self.decoder(codes) + self.pre_bias

own = sl.Dictionary.from_module(TheirModule(), x[:500], hook="blocks.1.hook_resid_pre")
```

A file of such tensors (safetensors, npz or .pt, of which only tensors are read) loads by `format="state_dict"`, if their names
are usual ones:

```python
torch.save(layers, "theirs.pt")
own = sl.load("theirs.pt", format="state_dict", rule="topk", options={"k": 8}, subtract_b_dec=False)
```

**A format of your own.** A format is a class:

    @register("my_format")
    class MyFormat(Format):
        def detect(self, path): ...         # judge by the content of the files
        def outline(self, path): ...        # describe the dictionary before its weights are read
        def write(self, dictionary, folder): ...

A package registers the class in the entry-point group `saelens_lite.formats`, so that `format="my_format"` finds it, and again
in a group for each ending of its file names. The package is imported only for files with these endings:

```toml
[project.entry-points."saelens_lite.formats"]
my_format = "my_package:MyFormat"

[project.entry-points."saelens_lite.formats.npz"]
my_format = "my_package:MyFormat"
```

For each of our parameters, `outline` names the tensor that holds it and the axes of that tensor. saelens_lite checks the sizes
and reorders the axes.

Do not trust files: read them with `read_json` and `open_tensors`, which check before they allocate and execute nothing.
"""

from saelens_lite.files import file_size, is_zip, read_json, write_json, write_text
from saelens_lite.formats.containers import JoinedFiles, TensorFile, TorchFile, open_tensors, strings_in_pickle, tensor_names
from saelens_lite.formats.contract import Format
from saelens_lite.formats.detection import format_of
from saelens_lite.formats.hooks import fill_layer, hook_of_module, match_in_path
from saelens_lite.formats.known import Known
from saelens_lite.formats.outline import AXES, PLAIN, Outline
from saelens_lite.formats.reading import find_file, inspect, read
from saelens_lite.formats.settings import Settings
from saelens_lite.formats.state_dict import read_state_dict
from saelens_lite.formats.writing import cannot_write, write, write_torch
from saelens_lite.ports import apart, split_key
from saelens_lite.tensor_files import Spec, write_tensors

__all__ = [
    "AXES",
    "PLAIN",
    "Format",
    "JoinedFiles",
    "Known",
    "Outline",
    "Settings",
    "Spec",
    "TensorFile",
    "TorchFile",
    "apart",
    "cannot_write",
    "file_size",
    "fill_layer",
    "find_file",
    "format_of",
    "hook_of_module",
    "inspect",
    "is_zip",
    "match_in_path",
    "open_tensors",
    "read",
    "read_json",
    "read_state_dict",
    "split_key",
    "strings_in_pickle",
    "tensor_names",
    "write",
    "write_json",
    "write_tensors",
    "write_text",
    "write_torch",
]
