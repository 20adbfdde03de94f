"""Hook a model: read and write the activations of a frozen language model by transformer-lens hook names.

```python
lm = sl.load_model("tiny")  # the embedded GPT-2; or "gpt2", any Hub id, a local folder
hook = "blocks.2.hook_resid_pre"  # lm.hook_names lists the usual ones
acts = lm.run(["some text"], hooks=[hook])  # {hook: [batch pos d_model]}; stops right after the deepest hook
probability = lm.logits("The old man looked at")[0, -1].softmax(-1)  # [d_vocab], of the next token
print(lm.generate("The old man looked at", 30))
```

Activations are those of the Hugging Face model, without LayerNorm folding. With `center_writing_weights=True` the mean is
taken out of everything that is written to the residual stream; caches and dictionaries remember it, and a model that was
loaded the other way is refused. Position 0 is BOS. `run`, `capture` and `evaluate` add it where the tokenizer has one.

`splice` puts a dictionary in place of an activation, or edits some of its codes there; see `saelens_lite.interventions`.

A model of the Hub records its commit, and later commands load that commit. Its Python code runs only with `load_model(…,
trust_remote_code=True)` or, in a command, `--model NAME --trust-remote-code`.
"""

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saelens_lite.config import Origin
from saelens_lite.devices import chosen_device
from saelens_lite.errors import ConfigError, HookError, HubError, HubUnreachableError, ModelNotFoundError, ShapeError
from saelens_lite.model import generation as _generation
from saelens_lite.model import hooks as _hooks
from saelens_lite.model import identities as _identities
from saelens_lite.model import norms as _norms
from saelens_lite.model import processing as _processing
from saelens_lite.model import readout as _readout
from saelens_lite.paths import check_input
from saelens_lite.ports import Hooks, Port, apart, together
from saelens_lite.tokens import Given, TokenRows, prompt_rows
from saelens_lite.tokens.inputs import Aligned, Ids, aligned, token_ids
from saelens_lite.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EMBEDDED", "LanguageModel", "load_model", "model_of"]

EMBEDDED = {"tiny": files("saelens_lite") / "data" / "tiny"}
FINGERPRINT_ENTRIES = 256  # of each weight
UNLIMITED_N_CTX = 2048  # for models without position embeddings (ALiBi, recurrent), which name no longest row
log = logging.getLogger(__name__)


@runtime_checkable
class Reconstructor(Protocol):
    """What `LanguageModel.splice` needs of a dictionary."""

    origin: Origin
    reads: tuple[Port, ...]
    writes: tuple[Port, ...]
    writes_what_it_reads: bool

    def __call__(self, x: Tensor) -> Tensor: ...

    def check_input(self, x: Tensor) -> None: ...


@runtime_checkable
class Editable(Reconstructor, Protocol):
    """What it needs in addition when there are edits."""

    def check_edits(self, edits: Sequence[Any]) -> None: ...

    def change(self, x: Tensor, edits: Sequence[Any], at: Sequence[Tensor]) -> Tensor: ...


@runtime_checkable
class PositionedEdit(Protocol):
    """What it needs of an edit: where it acts. What it does there is between the edit and the dictionary."""

    @property
    def positions(self) -> tuple[int, ...] | slice | None: ...


class _Enough(Exception):
    """Raised inside a hook to end a forward pass whose remaining blocks nobody needs."""


def load_model(
    name: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    center_writing_weights: bool = False,
    trust_remote_code: bool = False,
) -> "LanguageModel":
    """A causal language model, frozen, in evaluation mode.

    `name` is "tiny" (embedded, no network), a local folder, or a Hugging Face Hub id such as "gpt2". `device` defaults to
    CUDA where there is one, else MPS where it works, else the CPU. `center_writing_weights`: see
    `LanguageModel.center_writing_weights_`. `trust_remote_code` runs Python code that comes with the model's files, which may
    do anything; without it such a model is refused, and nobody is asked on the terminal.

    Raises:
        ModelNotFoundError: no such model, no network, an architecture transformers does not know, or a model that needs
            code of its own.
        ConfigError: the writing weights of this model cannot be centred.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    check_input(name)
    where = EMBEDDED.get(str(name)) or (Path(name).expanduser() if str(name).startswith("~") else name)
    local = Path(str(where)).is_dir()
    if not local and (isinstance(name, Path) or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1):
        raise ModelNotFoundError(f"no model folder at {name}; give a folder with config.json, a Hub id, or 'tiny'")
    commit, only_cached = (revision, True) if local else _on_hub(str(name), revision)
    source = {"revision": revision, "local_files_only": only_cached, "trust_remote_code": bool(trust_remote_code)}
    device = chosen_device(device)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(str(where), **source)
        if not trust_remote_code and _names_kernels(config):
            raise _needs_code(name)
        module = AutoModelForCausalLM.from_pretrained(str(where), dtype=dtype, config=config, **source)
        tokenizer = None
        if not local or _has_tokenizer(Path(str(where))):
            tokenizer = AutoTokenizer.from_pretrained(str(where), **source)
    except ModelNotFoundError:
        raise
    except Exception as error:  # transformers raises errors of many kinds for a damaged folder
        reason = " ".join(str(error).split())
        if not trust_remote_code and "trust_remote_code" in reason:
            raise _needs_code(name) from error
        help_ = "check the folder." if local else "is it a causal language model that transformers knows?"
        raise ModelNotFoundError(f"cannot load the model {str(name)!r}: {help_} transformers says: {reason[:400]}") from error
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    if tokenizer is None or set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        log.warning("%s has no tokenizer: it takes token ids, and text is refused", name)
        tokenizer = None  # transformers makes up one that knows only special tokens
    lm = LanguageModel(module.to(device), tokenizer, name=str(name), revision=commit)
    return lm.center_writing_weights_() if center_writing_weights else lm


def model_of(
    *origins: Origin,
    name: str | Path | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> "LanguageModel":
    """Return the model that dictionaries of these origins were trained on, or the named one, with its weights processed alike.

    The commit in the origin holds unless another model or `revision` is named. An origin comes out of a file: it cannot allow
    code of a model to be run, and a folder of this computer that it names is mentioned in the log.

    Raises:
        ConfigError: the origins name several models or commits; `trust_remote_code` without a name.
        ModelNotFoundError: as `load_model`.
    """
    places = list(dict.fromkeys((o.model, o.revision) for o in origins if o.model is not None and name in (None, o.model)))
    found = ", ".join(model if commit is None else f"{model} at {commit}" for model, commit in places)
    if len({model for model, _ in places}) > 1:
        raise ConfigError(f"the dictionaries were trained on several models: {found}; name the one to use")
    if revision is None and len(places) > 1:
        raise ConfigError(f"the dictionaries were trained on several commits of one model: {found}; name the revision to use")
    model, commit = places[0] if places else (None, None)
    if name is None and trust_remote_code:
        raise ConfigError(f"only code of a model that you name is run; name the model as well, if you trust {model or 'tiny'}")
    if name is None and model is not None:
        mention_folder(model)
    return load_model(
        name or model or "tiny",
        device=device,
        revision=revision or commit,
        center_writing_weights=any(_processing.CENTER_WRITING_WEIGHTS in origin.processing for origin in origins),
        trust_remote_code=trust_remote_code,
    )


def mention_folder(name: str) -> None:
    """Say in the log that a file, not the user, names a folder of this computer as the model to load."""
    if name not in EMBEDDED and Path(name).expanduser().is_dir():
        log.warning("the model is the folder %s, which a file names; if that is not your model, name yours", name)


def _needs_code(name: str | Path) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the model {str(name)!r} needs Python code that comes with its files, which was not run; read that code, and if you "
        f"trust it say load_model({str(name)!r}, trust_remote_code=True), or --trust-remote-code in a command"
    )


def _names_kernels(config: Any) -> bool:
    """Return whether settings of a model name code on the Hub that computes its attention or its experts."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    kinds = ("_attn_implementation", "_experts_implementation")
    return any("/" in str(getattr(part, kind, None)) for part in parts for kind in kinds)


def _has_tokenizer(folder: Path) -> bool:
    """Return whether a model folder has any of the files that tokenizers are kept in."""
    patterns = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json")
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _on_hub(name: str, revision: str | None) -> tuple[str, bool]:
    """The commit of a model on the Hub, and whether only the cache has its files.

    transformers alone would try to reach the Hub for half a minute before it looks into the cache.
    """
    from saelens_lite.hub_client.models import find_model

    try:
        return find_model(name, revision)
    except HubUnreachableError as error:
        raise ModelNotFoundError(
            f"cannot load the model {name!r}: without a network use 'tiny' or a local folder with the model's files. {error}"
        ) from None
    except HubError as error:
        raise ModelNotFoundError(f"cannot load the model {name!r}, which is no folder here: {error}") from None


class LanguageModel(Tokenizer):
    """A transformers model and its tokenizer; make one with `load_model`, or wrap a module of your own, which is frozen by it
    and gets torch's fused GELU. With tokenizer=None it takes token ids only."""

    def __init__(
        self, module: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", *, name: str, revision: str | None = None
    ):
        self.module = module.eval().requires_grad_(False)
        _processing.use_fused_gelu_(self.module)
        self.revision = revision
        self.processing: tuple[str, ...] = ()  # what was done to the weights, which the activations therefore depend on
        config = module.config.get_text_config()
        self.d_model: int = config.hidden_size
        self.n_layers: int = config.num_hidden_layers
        named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # the latter: MPT, DBRX
        longest = (n for n in (_n_positions(self.module), *named) if n and n > 0)  # XLNet says −1
        super().__init__(tokenizer, name=name, n_ctx=next(longest, UNLIMITED_N_CTX), d_vocab=config.vocab_size)
        self._n_positions: int | None = None  # while generating: of the prompt and all that may follow
        self._n_whole_rows = 0  # splices in force that need the whole row at once
        self._aligned: Aligned | None = None  # what the current forward pass reads, where its rows were moved

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return self.module.dtype

    def fingerprint(self) -> str:
        """sha256 over some entries of each weight: tells apart models of one name, of which one was trained further."""
        digest = hashlib.sha256()
        for name, weight in self.module.named_parameters():
            entries = weight.detach().flatten()
            entries = entries[:: max(1, len(entries) // FINGERPRINT_ENTRIES)].cpu().contiguous()
            digest.update(f"{name} {tuple(weight.shape)}\n".encode())
            digest.update(entries.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def _architecture(self) -> _hooks.Architecture:
        return _hooks.architecture(self.module, self.name)

    @cached_property
    def _identities(self) -> _identities.Identities:
        return _identities.Identities(self.module, self._architecture)

    @property
    def hook_names(self) -> list[str]:
        """The residual-stream and sublayer hooks, in the order of the forward pass."""
        return [name for name in _hooks.usual_names(self.module, self._architecture) if self._identities.holds(name)]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the model, in order."""
        component = self._architecture.components.get("blocks")
        return [] if component is None else list(self.module.get_submodule(component.name))

    def hook_point(self, name: str) -> _hooks.HookPoint:
        """Return the module and side that a hook name stands for.

        hook_resid_mid, hook_attn_out, hook_mlp_out, hook_embed and hook_pos_embed promise that tensors add up; the first use
        of one checks this on a forward pass over four tokens.

        Raises:
            HookError: the model has no such hook, or none whose tensors add up; the message says what to use instead.
        """
        return self._identities.point(name)

    def center_writing_weights_(self) -> "LanguageModel":
        """This model, with the mean over d_model taken out of everything that is added to the residual stream: the
        embeddings, and the output weights and biases of attention and MLP. Its logits stay the same, because each LayerNorm
        takes the mean out anyway; its stream has mean zero. `processing` tells, and is kept with caches and dictionaries.

        Raises:
            ConfigError: a norm of the model is no LayerNorm, or transformer-lens does not say what writes to the stream.
        """
        _processing.center_writing_weights_(self.module, self._architecture)
        self.processing = (_processing.CENTER_WRITING_WEIGHTS,)
        return self

    def redrawn(self, seed: int = 0) -> "LanguageModel":
        """A copy of this model that has learned nothing: the entries of each of its weight tensors in random order.

        Each tensor keeps its scale and distribution, and weights that were shared still are.

        Source: Heap, Lawson, Farnik and Aitchison 2025, Sparse autoencoders can interpret randomly initialized transformers,
        arXiv:2501.17727, whose re-randomised models draw each tensor from a Gaussian of its mean and variance instead.
        """
        module = copy.deepcopy(self.module)
        _processing.shuffle_weights_(module, seed)
        redrawn = LanguageModel(module, self.tokenizer, name=f"{self.name}, weights re-drawn")
        return redrawn.center_writing_weights_() if self.processing else redrawn

    def check_origin(self, origin: Origin) -> None:
        """Raise ConfigError when activations of this origin come from a model whose weights were processed otherwise.

        An origin that names no model says nothing about its processing.
        """
        if origin.processing == self.processing or (origin.model is None and not origin.processing):
            return
        wanted = _processing.CENTER_WRITING_WEIGHTS in origin.processing
        raise ConfigError(
            f"the dictionary belongs to {origin.model or 'a model'} with processing {list(origin.processing)}; {self.name} was "
            f"loaded with {list(self.processing)}: use load_model(..., center_writing_weights={wanted})"
        )

    def hooks_of(self, dictionary: Any, hook: str | None = None) -> Hooks:
        """Return the hooks at which a dictionary is used here: those of its ports, or `hook` in place of the one it reads.

        Raises:
            ConfigError: a port names no hook; `hook` is given for a dictionary that reads several; the dictionary is of two
                models, or of one whose weights were processed otherwise.
            HookError: this model lacks a hook.
        """
        self.check_origin(dictionary.origin)
        ports = (*dictionary.reads, *dictionary.writes)
        if len({port.model for port in ports}) > 1:
            raise ConfigError(f"the dictionary is of several models; it cannot be used in {self.name} alone")
        reads, writes = ([port.hook for port in side] for side in (dictionary.reads, dictionary.writes))
        if hook is not None:
            if len(reads) > 1:
                raise ConfigError(f"hook = {hook!r} names one hook; the dictionary reads {' and '.join(map(str, reads))}")
            reads, writes = [hook], [hook] if dictionary.writes_what_it_reads else writes
        if None in reads:
            raise ConfigError("the dictionary does not say which hook it belongs to; give hook=")
        if None in writes:
            raise ConfigError("the dictionary does not say which hook it writes; make it with writes=Port(hook=…, width=…)")
        for name in (*reads, *writes):
            self.hook_point(name)
        return Hooks(tuple(reads), tuple(writes))

    def to_tokens(self, texts: Given, *, attention_mask: Any = None, prepend_bos: bool | None = None) -> TokenRows:
        """Return one row for each text, with padding on the right, cut at n_ctx; or token ids as rows.

        Args:
            texts: A string, strings, or a Path; or token ids [batch pos] or [pos] as tensor, array, lists, or a tokenizer's
                output, which are taken as they stand. Padding on the left is removed where a mask tells about it.
            attention_mask: Of token ids: 1 where there is a token, 0 where there is padding.
            prepend_bos: Whether texts get a BOS token in front. Default: where the tokenizer has one. A text that begins
                with the BOS token gets no second one.

        Raises:
            TextError: a text is empty or has no tokens; the model has no tokenizer; no text and no token ids were given.
            ShapeError: token ids, lengths or a mask the model cannot take.
            ConfigError: prepend_bos is true and the tokenizer has no BOS token.
        """
        if isinstance(texts, TokenRows) and attention_mask is None:
            return texts
        ids = token_ids(texts, attention_mask)
        if ids is None:
            return prompt_rows(self, texts, prepend_bos=prepend_bos)
        self.check_ids(ids)
        self.warn_of_leading_pads(ids)
        rows = aligned(ids, self.pad_id)
        found = TokenRows(rows.tokens, self.countable(rows.tokens), rows.length, ends_text=False)
        return found if rows.length is None else found._replace(keep=found.keep & found.holds_token)

    def _read(self, given: Given, attention_mask: Any, prepend_bos: bool | None) -> Aligned:
        """Return what was given as rows of token ids on the device of the model."""
        ids = given if isinstance(given, Ids) else token_ids(given, attention_mask)
        if ids is None:
            rows = self.to_tokens(given, prepend_bos=prepend_bos)
            ids = Ids(rows.tokens, rows.holds_token)
        else:
            self.check_ids(ids)
            if not isinstance(given, Ids | TokenRows):
                self.warn_of_leading_pads(ids)
        return aligned(Ids(ids.tokens.to(self.device), ids.mask), self.pad_id)

    def _forward(self, rows: Aligned, **settings: Any) -> Any:
        """Run the module on rows; what a splice has to know of them is known to it meanwhile."""
        if rows.length is not None and not self.is_causal:
            holds = torch.arange(rows.tokens.shape[1], device=self.device) < rows.length[:, None]
            settings["attention_mask"] = holds.long()
        before, self._aligned = self._aligned, rows
        try:
            return self.module(rows.tokens, use_cache=False, **settings)
        finally:
            self._aligned = before

    @cached_property
    def is_causal(self) -> bool:
        """Whether each position reads only those before it, found by trying out what another last token changes."""
        last = torch.arange(self.d_vocab)[-2:]
        tokens = torch.stack([torch.cat([torch.arange(3) % self.d_vocab, i[None]]) for i in last]).to(self.device)
        tokens = tokens[:, -self.n_ctx :]
        with torch.no_grad(), _hooks.alone():
            a, b = self.module(tokens, use_cache=False).logits[:, :-1].float()
        if not a.numel():
            return True
        differ = (a - b).abs() > 1e-3 * a.abs().max()  # false where a model gives NaN, which is refused elsewhere
        return not bool(differ.any())

    def check_causal(self, what: str) -> None:
        """Raise ConfigError when positions read those after them, so that there is no prediction of a next token."""
        if not self.is_causal:
            raise ConfigError(
                f"{what} needs a model that predicts the next token; in {type(self.module).__name__} every position reads the "
                "whole row"
            )

    @torch.no_grad()
    def run(
        self, texts: Given, hooks: Sequence[str] | str, *, attention_mask: Any = None, prepend_bos: bool | None = None
    ) -> dict[str, Float[Tensor, "batch pos d"]]:
        """Return the activations at hooks; the forward pass ends at the deepest of them.

        Activations at padded positions mean nothing; `to_tokens(texts).keep` tells where there are tokens that count. With an
        attention_mask, the other activations are those of the row without its padding, wherever that stands.

        Args:
            texts: Text or token ids, as `to_tokens` takes them.
            hooks: Names of hooks, as transformer-lens has them.
            attention_mask, prepend_bos: As `to_tokens` takes them.

        Raises:
            HookError: a hook the model does not have (near matches listed), or whose value is not [batch pos d].
            TextError, ShapeError, ConfigError: as `to_tokens`.
        """
        names = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
        points = [self.hook_point(name) for name in names]
        if not points:
            raise ConfigError("name at least one hook")
        rows = self._read(texts, attention_mask, prepend_bos)
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Any], None]:
            def visit(value: Any) -> None:
                x = _activation(name, value, rows.tokens)
                if len(found.keys() | {name}) == len(points):
                    found[name] = x
                    raise _Enough
                found[name] = x.clone()  # some models go on to overwrite it: Falcon adds the attention's output to the MLP's

            return visit

        handles = [point.on_value(keep(point.name)) for point in points]
        try:
            self._forward(rows)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if missing := names - found.keys():
            raise HookError(f"the forward pass of {type(self.module).__name__} never came to {', '.join(sorted(missing))}")
        return {name: rows.restored(found[name]) for name in names}

    def logits(
        self,
        texts: Given,
        *,
        attention_mask: Any = None,
        prepend_bos: bool | None = None,
        differentiable: bool = False,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return next-token logits; a splice in force is seen by them.

        Args:
            texts: Text or token ids, as `to_tokens` takes them.
            attention_mask, prepend_bos: As `to_tokens` takes them. Logits at masked positions mean nothing.
            differentiable: Keep the graph that leads to what a `replace` in force put in. The weights are frozen and get no
                gradient.

        Raises:
            TextError, ShapeError, ConfigError: as `to_tokens`.
        """
        rows = self._read(texts, attention_mask, prepend_bos)
        with torch.set_grad_enabled(differentiable):
            return rows.restored(self._forward(rows).logits)

    @contextmanager
    def replace(self, hook: str, new: Callable[[Float[Tensor, "batch pos d"]], Float[Tensor, "batch pos d"]]) -> Iterator[None]:
        """Replace the activation at `hook` by `new(activation)` within the block.

        Some parts of some models, such as OPT's MLP, see the rows of a batch as one long row: `new` gets them apart.

        Raises:
            HookError: no such hook, or its value is not [batch pos d].
        """
        shape: list[int] = []  # [batch pos] of the forward pass under way

        def note_shape(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            token_ids = args[0] if args else next(iter(kwargs.values()))
            shape[:] = token_ids.shape

        def visit(value: Any) -> Tensor | None:
            if isinstance(value, Tensor) and value.ndim == 3:
                return new(value)
            if isinstance(value, Tensor) and value.ndim == 2 and len(shape) == 2 and len(value) == shape[0] * shape[1]:
                apart = rearrange(value, "(batch pos) d -> batch pos d", batch=shape[0])
                changed = new(apart)
                return value if changed is apart else rearrange(changed, "batch pos d -> (batch pos) d")
            raise HookError(f"{hook} of {type(self.module).__name__} is {_shape(value)}; only [batch pos d] can be replaced")

        point, embeddings = self.hook_point(hook), self.module.get_input_embeddings()
        handles = [point.on_value(visit), embeddings.register_forward_pre_hook(note_shape, with_kwargs=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def splice(
        self,
        dictionary: "Reconstructor",
        edits: "PositionedEdit | Sequence[PositionedEdit]" = (),
        *,
        error_term: bool | None = None,
        hook: str | None = None,
        keep: Bool[Tensor, "batch pos"] | None = None,
    ) -> Iterator[None]:
        """Within the block, the model reads the dictionary's reconstruction, or its own activation with some codes edited.

        Without edits, the activation at each hook that the dictionary writes is its output there. With edits
        (`saelens_lite.interventions.edits`) the activation y there keeps its error term by default,
        y + Σ_i (new_i − old_i) W_dec[i], so that nothing but the edits changes the model; error_term=False edits the output
        instead. A dictionary of several hooks reads them in a pass of its own, in which nothing is replaced.

        Positions the dictionary was never trained on keep their activation, unless an edit names them: special tokens
        wherever they stand, padding, and the positions its origin excludes, by default position 0. `keep` chooses the positions
        that may change instead.

        Raises:
            HookError: this model lacks a hook of the dictionary, or comes to the one it writes before the one it reads.
            ConfigError: the dictionary belongs to a model whose weights were processed otherwise; a port names no hook; an edit
                of a latent that the dictionary does not have; a dictionary of several hooks, and a pass with a cache.
            ShapeError: the dictionary has another width than the hook; an edit names a position behind the end of the row;
                `keep` is of another shape than the tokens.
        """
        hooks = self.hooks_of(dictionary, hook)
        edits = [edits] if isinstance(edits, PositionedEdit) else edits
        error_term = bool(edits) if error_term is None else error_term
        if edits:
            dictionary.check_edits(edits)
        in_place = hooks.reads == hooks.writes and len(hooks.reads) == 1
        reads_first = len(hooks.reads) + len(hooks.writes) > 2  # in a pass of its own
        read: dict[str, Tensor] = {}
        written: dict[str, Tensor] = {}
        ids: list[Tensor | None] = [None]
        offset = [0]  # position of the first token of the current forward pass; not 0 while generating with a cache
        is_reading = [False]

        def begin(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if is_reading[0]:
                return
            ids[0] = args[0] if args else kwargs.get("input_ids")
            offset[0] = _n_cached(kwargs.get("past_key_values"))
            read.clear()
            written.clear()
            if reads_first:
                if offset[0]:
                    raise ConfigError("a dictionary of several hooks needs the whole row; run the model without a cache")
                is_reading[0] = True
                try:
                    with _hooks.alone(), ExitStack() as stack:
                        for name in hooks.reads:
                            stack.enter_context(self.replace(name, look(name)))
                        self.module(*args, **(kwargs | {"use_cache": False, "past_key_values": None}))
                finally:
                    is_reading[0] = False

        def chosen_positions(y: Tensor, position: Tensor, target: str) -> Tensor:
            chosen = ~torch.isin(position, position.new_tensor(dictionary.origin.excluded_positions))
            if keep is not None:
                if keep.shape != y.shape[:2]:
                    raise ShapeError(
                        f"keep is {list(keep.shape)}; {target} is [batch pos d] = {list(y.shape)} in this forward pass"
                    )
                chosen = keep.to(y.device) if self._aligned is None else self._aligned.moved(keep.to(y.device))
            elif ids[0] is not None and ids[0].shape == y.shape[:2]:
                special = sorted(self.special_ids | set(dictionary.origin.excluded_token_ids))
                chosen = chosen & ~torch.isin(ids[0].to(y.device), position.new_tensor(special))
            return chosen

        def output(chosen: Tensor, position: Tensor) -> None:
            """Note what is written at each hook: the reconstruction, or what the edits add to the activation."""
            x = together(read, hooks.reads)
            dictionary.check_input(x)
            if not error_term:
                written.update(zip(hooks.writes, apart(dictionary(x), dictionary.writes), strict=True))
            if edits:
                at = [self._named_positions(edit, position, chosen, keep is not None) for edit in edits]
                changes = apart(dictionary.change(x, edits, at), dictionary.writes)
                written.update({f"{name} changed": part for name, part in zip(hooks.writes, changes, strict=True)})

        def rewrite(target: str) -> Callable[[Tensor], Tensor]:
            def act(y: Tensor) -> Tensor:
                if is_reading[0]:
                    return y
                if in_place:
                    read[target] = y
                if missing := [name for name in hooks.reads if name not in read]:
                    raise _target_first(missing[0], target)
                position = torch.arange(y.shape[1], device=y.device) + offset[0]
                chosen = chosen_positions(y, position, target)
                if in_place or not written:
                    output(chosen, position)
                new = y
                if not error_term:
                    new = torch.where(chosen[..., None], _as(y, written[target], target), y)
                return new + _as(y, written[f"{target} changed"], target) if edits else new

            return act

        def look(name: str) -> Callable[[Tensor], Tensor]:
            def note(x: Tensor) -> Tensor:
                read[name] = x.clone()  # some models go on to overwrite it
                return x

            return note

        with ExitStack() as stack:
            beginning = self.module.register_forward_pre_hook(begin, with_kwargs=True)
            stack.callback(beginning.remove)
            if not in_place and not reads_first:
                for name in hooks.reads:
                    stack.enter_context(self.replace(name, look(name)))
            for target in hooks.writes:
                stack.enter_context(self.replace(target, rewrite(target)))
            self._n_whole_rows += reads_first
            stack.callback(self._less_whole_rows, reads_first)
            yield

    def _less_whole_rows(self, n: int) -> None:
        self._n_whole_rows -= n

    def check_order(self, hook: str, target: str) -> None:
        """Raise HookError when the model comes to `target` before `hook`, from which a dictionary predicts it."""
        met: list[str] = []

        def noting(name: str) -> Callable[[Tensor], Tensor]:
            return lambda x: (met.append(name), x)[1]

        with self.replace(hook, noting(hook)), self.replace(target, noting(target)):
            self.logits(torch.zeros(1, 1, dtype=torch.long))
        if met[:1] != [hook]:
            raise _target_first(hook, target)

    def _named_positions(
        self, edit: "PositionedEdit", position: Int[Tensor, " pos"], chosen: Bool[Tensor, "*batch pos"], only_chosen: bool
    ) -> Bool[Tensor, "*_batch pos"]:
        """Where an edit acts: at the positions it names, or, if it names none, at the chosen ones."""
        named = edit.positions
        if named is None:
            return chosen
        if isinstance(named, slice):
            span = range(*named.indices(self.n_ctx))  # of millions of positions, for some models
            here = (position >= span.start) & (position < span.stop) & ((position - span.start) % span.step == 0)
        else:
            n = self._n_positions or int(position[-1]) + 1
            if beyond := [i for i in named if i >= n]:
                raise ShapeError(f"{edit} names position {beyond[0]}; this row has positions 0 to {n - 1}")
            here = torch.isin(position, position.new_tensor(named))
        return here & chosen if only_chosen else here

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 50,
        *,
        temperature: float | int = 0.8,
        top_k: int | None = 50,
        seed: int = 0,
        prepend_bos: bool | None = None,
    ) -> str:
        """Return the prompt and its continuation, up to `max_new_tokens`, the end of the model's context or an EOS token.

        EOS tokens are the tokenizer's and those of the module's `generation_config`; the text does not include them.
        Temperature 0 takes the likeliest token each time. A splice in force acts on every position as in a single pass over
        the whole text, whether the model has a key-value cache or not. `prepend_bos`: as `to_tokens` takes it.

        Raises:
            ConfigError: a temperature that is negative or not finite; top_k or max_new_tokens below 1.
            TextError, ShapeError: an empty prompt, or one that fills the model's context.
            NonFiniteError: the logits are NaN or infinite.
        """
        return _generation.generate(
            self, prompt, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed, prepend_bos=prepend_bos
        )

    @cached_property
    def has_usable_cache(self) -> bool:
        """Whether the model's key-value cache gives the logits of a whole pass, tried on a few tokens; else generation
        recomputes the row for each new token."""
        with _hooks.alone():
            usable = _generation.cache_is_usable(self)
        if not usable:
            log.info("%s generates without a key-value cache: each new token takes a pass over the whole row", self.name)
        return usable

    def unembedding(self, *, fold_norm: bool = True) -> Float[Tensor, "d_vocab d_model"]:
        """Return W_U with the final norm's scale folded in, or, without fold_norm, as it is.

        A direction's dot product with a row is its effect on that token's logit, up to the positive factor the norm divides
        by and a shift common to all tokens. A projection between norm and head is multiplied in. Post-norm models have no
        final norm: there, effects are those of the last block's output, and the norms inside blocks do not count.

        Raises:
            ConfigError: there is more than a norm and a projection between the last block and the head.
        """
        weight = self._readout.weight()
        norm = self._final_norm
        if norm is None:
            log.warning("%s has no final norm: effects on logits are those of its last block's output", self.name)
        if norm is None or not fold_norm:
            return weight
        weight = weight * norm.scale.float().to(weight.device)
        return weight - weight.mean(1, keepdim=True) if norm.centres else weight

    def final_norm_divisor(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape"]:
        """Return the positive factor by which the final norm divides the last block's output; 1 without such a norm.

        `x @ unembedding().T / final_norm_divisor(x)` are the logits up to what does not depend on x.
        """
        norm, before = self._final_norm, self._readout.before
        if norm is None:
            return x.new_ones(x.shape[:-1])
        return (norm.divisor(x * before) / before).to(torch.promote_types(x.dtype, torch.float32)).to(x.device)

    @cached_property
    def _readout(self) -> _readout.Readout:
        return _readout.Readout.of(self.module, self._architecture)

    @property
    def _final_norm(self) -> _norms.FinalNorm | None:
        norm = self._readout.norm
        return None if norm is None else _norms.FinalNorm.of(norm, self.d_model)

    def bridge(self) -> Any:
        """transformer-lens's TransformerBridge on a copy of this model, for everything hooks here do not cover."""
        from transformer_lens.model_bridge import TransformerBridge

        module = copy.deepcopy(self.module)  # it is switched to eager attention and its blocks are wrapped
        module.config.architectures = [type(module).__name__]
        where = str(EMBEDDED.get(self.name, self.name))
        return TransformerBridge.boot_transformers(
            where, hf_model=module, tokenizer=copy.deepcopy(self.tokenizer), device=str(self.device)
        )

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.module.parameters())
        return (
            f"LanguageModel({self.name!r}, {type(self.module).__name__}, {n / 1e6:.1f} M parameters, {self.n_layers} layers, "
            f"d_model {self.d_model}, n_ctx {self.n_ctx}, {self.d_vocab} tokens, {self.device}, {str(self.dtype)[6:]}"
            f"{''.join(f', {done}' for done in self.processing)})"
        )


def _n_cached(past: Any) -> int:
    """Return how many tokens a key-value cache holds."""
    length = getattr(past, "get_seq_length", None)
    return 0 if length is None else int(length())


def _n_positions(module: nn.Module) -> int | None:
    """Return how many tokens the position embeddings reach, where some of them are set aside for padding; else None.

    RoBERTa counts positions from padding_idx + 1 on, so the last rows of its table are never used for more tokens.
    """
    for name, part in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            return part.num_embeddings - part.padding_idx - 1
    return None


def _activation(name: str, value: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d"]:
    """The value at a hook as activations; HookError when it holds none."""
    batch, pos = tokens.shape
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.ndim == 3 and value.shape[:2] in ((batch, pos), (1, pos)):  # position embeddings lack the batch
            return value.expand(batch, pos, -1)
        if value.ndim == 2 and len(value) == batch * pos:  # OPT's MLP
            return rearrange(value, "(batch pos) d -> batch pos d", batch=batch)
    raise HookError(f"{name} is {_shape(value)} for tokens [{batch} {pos}]; only activations [batch pos d] are captured")


def _target_first(hook: str, target: str) -> HookError:
    return HookError(f"the model comes to {target} before {hook}, from which the dictionary predicts it")


def _as(y: Float[Tensor, "batch pos d"], new: Tensor, hook: str) -> Float[Tensor, "batch pos d"]:
    """What a dictionary gives for an activation, in its dtype; ShapeError when it has another shape."""
    if new.shape != y.shape:
        raise ShapeError(f"the dictionary gives {list(new.shape)}; {hook} of this model is {list(y.shape)}")
    return new.to(y.dtype)


def _shape(value: Any) -> str:
    """What a hook saw, for an error message."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
