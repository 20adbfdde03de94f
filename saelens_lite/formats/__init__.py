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
OpenAI, Qwen-Scope, Goodfire) are read only on request (`format="openai"`), and only their tensors. For tensors in no known
format, use `sl.Dictionary.from_tensors(W_enc=…, W_dec=…, b_enc=…, b_dec=…, rule="topk", options={"k": 32})`.

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
from saelens_lite.formats.containers import TensorFile, TorchFile, open_tensors, strings_in_pickle, tensor_names
from saelens_lite.formats.contract import Format
from saelens_lite.formats.detection import format_of
from saelens_lite.formats.hooks import fill_layer, hook_of_module, match_in_path
from saelens_lite.formats.known import Known
from saelens_lite.formats.outline import AXES, Outline
from saelens_lite.formats.reading import find_file, inspect, read
from saelens_lite.formats.settings import Settings
from saelens_lite.formats.writing import cannot_write, write, write_torch
from saelens_lite.tensor_files import write_tensors

__all__ = [
    "AXES",
    "Format",
    "Known",
    "Outline",
    "Settings",
    "TensorFile",
    "TorchFile",
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
    "strings_in_pickle",
    "tensor_names",
    "write",
    "write_json",
    "write_tensors",
    "write_text",
    "write_torch",
]
