"""A sparse dictionary: W_enc, b_enc, W_dec, b_dec and the rule that makes codes sparse.

    h = (x − b_dec) W_enc + b_enc        codes = rule(h)        x_hat = codes W_dec + b_dec

On disk it is a folder that SAELens 6 loads as it stands: cfg.json, sae_weights.safetensors, sparsity.safetensors.
What SAELens does not know stands under `metadata.saelens_lite` in cfg.json, and a rule's tensors that the published
architecture has no place for in plugin.safetensors.
"""

import importlib.metadata
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelens_lite.codes import SparseCodes
from saelens_lite.codes.encoder import Encoder
from saelens_lite.config import Origin
from saelens_lite.errors import ConfigError, CorruptFileError, NonFiniteError, ShapeError
from saelens_lite.files import DTYPES, new_folder, read_json, read_tensors, write_json
from saelens_lite.sparsity import Sparsity, registry

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE, SPARSITY_FILE, PLUGIN_FILE = (
    "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "plugin.safetensors",
)  # fmt: skip


class Dictionary(nn.Module):
    """An overcomplete set of directions and a sparse code over them, for the activations of one hook.

    Calling it on x: Float[... d_in] returns the reconstruction x_hat. Where the rule is tied, W_enc is no parameter but W_decᵀ.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]

    def __init__(
        self,
        rule: Sparsity,
        *,
        d_in: int,
        d_sae: int,
        origin: Origin | None = None,
        density: Float[Tensor, " d_sae"] | None = None,
        training: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        self.origin = origin or Origin()
        self.density = density
        self.training_record = training or {}
        self.rule = rule
        if not rule.tied:
            self.W_enc = nn.Parameter(torch.zeros(d_sae, d_in).T)  # in memory a row a latent, like W_dec
        self.b_enc = nn.Parameter(torch.zeros(d_sae)) if rule.encoder_bias else None
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def __getattr__(self, name: str) -> Any:
        if name == "W_enc" and self.rule.tied:
            return self.W_dec.T
        return super().__getattr__(name)

    @classmethod
    def create(
        cls,
        sparsity: str,
        *,
        d_in: int,
        d_sae: int,
        options: dict[str, Any] | None = None,
        seed: int = 0,
        origin: Origin | None = None,
    ) -> "Dictionary":
        """A fresh dictionary: random directions of one norm, W_enc = W_decᵀ, biases zero.

        Raises:
            PluginError: no such sparsity rule.
            ConfigError: an option the rule does not have, or a bad value.
        """
        rule_class = registry.load(sparsity)
        rule = rule_class(rule_class.Config(**(options or {})), d_in=d_in, d_sae=d_sae)
        self = cls(rule, d_in=d_in, d_sae=d_sae, origin=origin)
        directions = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
        directions /= directions.norm(dim=1, keepdim=True)
        self.W_dec.data.copy_(directions * rule.initial_decoder_norm())
        if not rule.tied:
            self.W_enc.data.copy_(self.W_dec.data.T)
        return self.eval()

    def check_input(self, x: Tensor) -> None:
        """Raise ShapeError unless the last axis of x has d_in entries."""
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; this dictionary takes [..., {self.d_in}] ({self.origin.hook or 'any hook'})"
            )

    def pre(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_sae"]:
        """Pre-activations h = (x − b_dec) W_enc + b_enc."""
        self.check_input(x)
        h = (x.to(self.W_enc.dtype) - self.b_dec) @ self.W_enc
        return h if self.b_enc is None else h + self.b_enc

    def encode(self, x: Float[Tensor, "*shape d_in"]) -> SparseCodes:
        """Which latents fire for each activation, and how strongly; differentiable in x and the parameters.

        Raises:
            ShapeError: the last axis of x is not d_in.
        """
        self.check_input(x)
        flat = x.reshape(-1, self.d_in).to(self.W_enc.dtype)
        codes = self.rule.encode(Encoder(self.W_enc, self.b_enc, self.b_dec, flat))
        return codes._replace(shape=tuple(x.shape[:-1])).without_zeros()

    def decode(self, codes: SparseCodes | Float[Tensor, "*shape d_sae"]) -> Float[Tensor, "*shape d_in"]:
        """x_hat of sparse or dense codes."""
        if isinstance(codes, SparseCodes):
            return codes.decode(self.W_dec) + self.b_dec
        return codes @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_in"]:
        """x_hat, in the dtype of x."""
        return self.decode(self.encode(x)).to(x.dtype)

    @torch.no_grad()
    def fold_scale_(self, scale: float) -> "Dictionary":
        """Turn a dictionary of scale·x into one of x, with the same codes (where the rule is tied: codes of x)."""
        if not self.rule.tied:
            self.W_enc.mul_(scale)
            self.W_dec.div_(scale)
        self.b_dec.div_(scale)
        return self

    @torch.no_grad()
    def fold_decoder_norms_(self) -> "Dictionary":
        """Make decoder rows unit vectors and put their norms into the codes; x_hat stays the same.

        Rules whose codes do not scale latent by latent (top-k) are left as they are.
        """
        if not self.rule.homogeneous:
            return self
        norms = self.W_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1)
        self.W_enc.mul_(norms)
        if self.b_enc is not None:
            self.b_enc.mul_(norms)
        self.W_dec.div_(norms[:, None])
        self.rule.rescale_(norms)
        return self

    def save(self, path: str | Path, *, exists: Literal["error", "overwrite"] = "error") -> Path:
        """Write the dictionary folder; it appears whole or not at all.

        Raises:
            OutputExistsError: the folder holds something and `exists` is "error".
            NonFiniteError: a parameter is NaN or infinite.
        """
        from safetensors.torch import save_file

        own = {k: v for k, v in self.state_dict().items() if not k.startswith("rule.")}
        for name, tensor in self.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"{name} is not finite; a dictionary with NaN or infinity is not written")
        form = self.rule.inference_form()
        published = dict(form.tensors) if form else {}
        extra = {k.removeprefix("rule."): v for k, v in self.state_dict().items() if k.startswith("rule.")}
        extra = {k: v for k, v in extra.items() if k not in published}
        with new_folder(Path(path), exists) as folder:
            save_file({k: v.detach().cpu().contiguous() for k, v in (own | published).items()}, folder / WEIGHTS_FILE)
            if extra:
                save_file({k: v.detach().cpu().contiguous() for k, v in extra.items()}, folder / PLUGIN_FILE)
            if self.density is not None:
                save_file({"sparsity": (self.density.cpu().float() + 1e-10).log10()}, folder / SPARSITY_FILE)
            write_json(folder / CONFIG_FILE, self._config())
        return Path(path)

    def _config(self) -> dict[str, Any]:
        """The content of cfg.json."""
        form = self.rule.inference_form()
        plugin = registry.find(self.rule.plugin_name)
        return {
            "architecture": form.architecture if form else self.rule.plugin_name,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            **(form.settings if form else {}),
            "metadata": {
                "sae_lens_version": "6.0.0",  # without it SAELens reads the file as an old one and drops the metadata
                "model_name": self.origin.model,
                "model_class_name": self.origin.model_class or "AutoModelForCausalLM",
                "hook_name": self.origin.hook,
                "hook_head_index": None,
                "context_size": self.origin.n_ctx,
                "prepend_bos": self.origin.prepend_bos,
                "dataset_path": self.origin.text,
                "model_from_pretrained_kwargs": {},
                "saelens_lite": {
                    "format": FORMAT,
                    "sparsity": self.rule.plugin_name,
                    "options": self.rule.config.model_dump(),
                    "distribution": f"{plugin.distribution} {plugin.version}" if plugin.entry_point else None,
                    "version": importlib.metadata.version("saelens-lite"),
                    "origin": self.origin.model_dump(),
                    "training": self.training_record,
                },
            },
        }

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Dictionary":
        """The dictionary in a folder written by `save`.

        Raises:
            CorruptFileError: a file is missing, damaged, or does not fit cfg.json.
            PluginError: its sparsity rule is not installed; the message names the distribution that wrote it.
        """
        folder = Path(path)
        config = read_json(folder / CONFIG_FILE)
        metadata = config.get("metadata")
        ours = metadata.get("saelens_lite") if isinstance(metadata, dict) else None
        if not isinstance(ours, dict) or ours.get("format") != FORMAT:
            raise CorruptFileError(
                f"{folder / CONFIG_FILE} was not written by this version of saelens_lite (metadata.saelens_lite.format is "
                f"{ours.get('format') if isinstance(ours, dict) else 'absent'}, expected {FORMAT})"
            )
        try:
            d_in, d_sae, dtype = int(config["d_in"]), int(config["d_sae"]), DTYPES[config["dtype"]]
            rule_class = registry.load(ours["sparsity"], written_by=ours.get("distribution"))
            rule_config = rule_class.Config(**ours.get("options", {}))
            origin = Origin(**ours.get("origin", {}))
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise CorruptFileError(f"{folder / CONFIG_FILE}: {type(error).__name__}: {error}") from None
        tensors = read_tensors(folder / WEIGHTS_FILE)
        found = tuple(tensors["W_dec"].shape) if "W_dec" in tensors else None
        if found != (d_sae, d_in):  # else a forged size would be allocated
            raise CorruptFileError(f"{folder / WEIGHTS_FILE}: W_dec has shape {found}, cfg.json says {(d_sae, d_in)}")
        rule = rule_class(rule_config, d_in=d_in, d_sae=d_sae)
        self = cls(rule, d_in=d_in, d_sae=d_sae, origin=origin, training=ours.get("training"))
        if (folder / PLUGIN_FILE).exists():
            tensors |= {f"rule.{k}": v for k, v in read_tensors(folder / PLUGIN_FILE).items()}
        form = rule.inference_form()
        own = {"W_enc", "b_enc", "W_dec", "b_dec"}
        state = {k if k in own or k.startswith("rule.") else f"rule.{k}": v for k, v in tensors.items()}
        _check_state(folder, state, self.to(dtype).state_dict(), optional=set(form.tensors) if form else set())
        self.load_state_dict(state, strict=False)
        if (folder / SPARSITY_FILE).exists():
            log_density = read_tensors(folder / SPARSITY_FILE).get("sparsity")
            if log_density is None or log_density.shape != (d_sae,):
                raise CorruptFileError(f"{folder / SPARSITY_FILE}: expected a tensor 'sparsity' of shape {(d_sae,)}")
            self.density = (10.0 ** log_density.double() - 1e-10).clamp(min=0).float()
        return self.to(device).eval()

    def extra_repr(self) -> str:
        rule = getattr(self.rule, "plugin_name", "?")
        return f"d_in={self.d_in}, d_sae={self.d_sae}, sparsity={rule!r}, hook={self.origin.hook!r}"


def _check_state(folder: Path, found: dict[str, Tensor], expected: dict[str, Tensor], optional: set[str]) -> None:
    """Raise CorruptFileError unless names and shapes fit; a published tensor may be derived rather than stored."""
    missing = expected.keys() - found.keys()
    surplus = {k for k in found.keys() - expected.keys() if k.removeprefix("rule.") not in optional}
    if missing or surplus:
        raise CorruptFileError(
            f"{folder}: tensors missing: {sorted(missing) or 'none'}; not expected: {sorted(surplus) or 'none'}"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise CorruptFileError(f"{folder}: {name} has shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
        if found[name].dtype not in DTYPES.values():
            raise CorruptFileError(f"{folder}: {name} has dtype {found[name].dtype}; expected one of {', '.join(DTYPES)}")
