"""A frozen language model whose activations can be read, replaced and edited by transformer-lens hook names."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saelens_lite.config import Origin
from saelens_lite.cuda_streams import to_device
from saelens_lite.devices import float32_products, outside_models, tf32_is_on
from saelens_lite.errors import ConfigError, HookError
from saelens_lite.fingerprints import Fingerprint
from saelens_lite.model import generation as _generation
from saelens_lite.model import hooks as _hooks
from saelens_lite.model import identities as _identities
from saelens_lite.model import norms as _norms
from saelens_lite.model import processing as _processing
from saelens_lite.model import readout as _readout
from saelens_lite.model.nicknames import hub_id
from saelens_lite.model.port_places import PortPlace
from saelens_lite.model.splice import PositionedEdit, Reconstructor, Splice, target_first
from saelens_lite.model.spread import DeviceMap, input_device, is_whole
from saelens_lite.model.weight_hash import fingerprint_of
from saelens_lite.ports import Hooks, PortNames
from saelens_lite.tokens import Given, TokenRows, prompt_rows
from saelens_lite.tokens.inputs import Aligned, Ids, aligned, token_ids
from saelens_lite.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = {"tiny": files("saelens_lite") / "data" / "tiny"}
UNLIMITED_N_CTX = 2048  # for models that set no limit: ALiBi, recurrent
log = logging.getLogger(__name__)


class _Enough(Exception):
    """Raised inside a hook to end a forward pass after the deepest hook."""


class LanguageModel(Tokenizer):
    """A transformers model and its tokenizer; `load_model` makes one.

    It can also wrap your own module. This freezes the module and gives it torch's fused GELU. With tokenizer=None it takes
    token ids only.

    `tf32` decides on TF32 in the float32 products of its forward passes on CUDA: True, False, or None for the setting of torch.
    """

    def __init__(
        self, module: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", *, name: str, revision: str | None = None
    ):
        self.module = module.eval().requires_grad_(False)
        _processing.use_fused_gelu_(self.module)
        self.revision = revision
        self.processing: tuple[str, ...] = ()  # changes to the weights, which change the activations
        self.tf32: bool | None = None
        self.device_map: DeviceMap | None = None  # as `load_model` got it
        self._undo: list[Callable[[], Any] | None] = []  # while `redrawn` is active
        self._fingerprint = fingerprint_of(self.module) if self.is_shared else None  # while all processes are here
        config = module.config.get_text_config()
        self.d_model: int = config.hidden_size
        self.n_layers: int = config.num_hidden_layers
        named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # the latter: MPT, DBRX
        longest = (n for n in (_n_positions(self.module), *named) if n and n > 0)  # XLNet says −1
        super().__init__(tokenizer, name=name, n_ctx=next(longest, UNLIMITED_N_CTX), d_vocab=config.vocab_size)
        self.row_length: int | None = None  # during generation: length of the prompt and its longest continuation
        self.n_in_whole_rows = 0  # active splices that need the whole row at once
        self._aligned: Aligned | None = None  # the rows of the current forward pass, without left padding
        if self.is_shared:
            _ = self.is_causal  # a forward pass, which needs all processes

    @property
    def device(self) -> torch.device:
        """Device of the weights; for a model on several devices, that of token ids, activations at hooks, and logits."""
        return input_device(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.module.dtype

    @property
    def precision(self) -> str:
        """The number type of forward passes: "tf32" for float32 weights with TF32 products, else the dtype of the weights."""
        tf32 = tf32_is_on() if self.tf32 is None else self.tf32
        is_tf32 = tf32 and self.dtype == torch.float32 and self.device.type == "cuda"
        return "tf32" if is_tf32 else str(self.dtype).removeprefix("torch.")

    @property
    def is_shared(self) -> bool:
        """True if all processes of the team hold this model together, each a part of every weight (tensor parallelism).

        Each forward pass then needs all of them, with the same tokens, and gives the same activations in each. So code that
        deals batches or blocks to processes must give every process all of them, and write results in the first one only:
        `workers = ALONE if lm.is_shared else team()`. `unembedding` also needs all of them. Without tensor parallelism, a model
        belongs to its process alone.
        """
        return (getattr(self.module, "tp_size", None) or 1) > 1

    def fingerprint(self) -> Fingerprint:
        """Return a hash of every entry of the weights. It differs for models of one name with different weights."""
        return self._fingerprint or fingerprint_of(self.module)

    @cached_property
    def _architecture(self) -> _hooks.Architecture:
        return _hooks.architecture(self.module, self.name)

    @cached_property
    def _identities(self) -> _identities.Identities:
        return _identities.Identities(self.module, self._architecture)

    @property
    def hook_names(self) -> list[str]:
        """Names of the residual-stream and sublayer hooks, in the order of the forward pass."""
        return [name for name in _hooks.usual_names(self.module, self._architecture) if self._identities.holds(name)]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the model, in order."""
        component = self._architecture.components.get("blocks")
        return [] if component is None else list(self.module.get_submodule(component.name))

    def hook_point(self, name: str) -> _hooks.HookPoint:
        """Return the module and side that a hook name stands for.

        blocks.5.attn.hook_z.head_3 is the part of one head, also at hook_q, hook_k and hook_v where the model has these.
        hook_resid_mid, hook_attn_out, hook_mlp_out, hook_embed and hook_pos_embed promise that tensors add up. Their first
        use checks this on a forward pass over four tokens.

        Raises:
            HookError: the model has no such hook, or its tensors do not add up; the message names a hook to use instead.
        """
        return self._identities.point(name)

    def place(self, name: str) -> PortPlace:
        """Return this model and a hook of it; see `hook_point` for errors."""
        self.hook_point(name)
        return PortPlace(self, name)

    def has_hook(self, name: str) -> bool:
        """Return whether `hook_point` knows the name."""
        return self._identities.holds(name)

    def center_writing_weights_(self) -> "LanguageModel":
        """Subtract the mean over d_model from everything that is added to the residual stream, and return this model.

        These are the embeddings, and the output weights and biases of attention and MLP. The stream then has mean zero. The
        logits stay the same, because each LayerNorm subtracts the mean anyway. `processing` records the change, and caches
        and dictionaries store it.

        Raises:
            ConfigError: a norm of the model is not a LayerNorm, transformer-lens does not say what writes to the stream, or
                weights are on the disk or cut into parts.
        """
        self._needs_whole_weights("centring the writing weights")
        _processing.center_writing_weights_(self.module, self._architecture)
        self.processing = (_processing.CENTER_WRITING_WEIGHTS,)
        return self

    def _check_weights(self) -> None:
        if self._undo:
            raise ConfigError(
                f"the weights of {self.name} are in random order: use the model that `redrawn` gives until its block ends; if "
                "its end was interrupted, load the model again"
            )

    def _needs_whole_weights(self, what: str) -> None:
        if not is_whole(self.module):
            raise ConfigError(
                f"{what} needs all weights of the model in this process; some are elsewhere, because {self.name} was "
                f"loaded with device_map={self.device_map!r}"
            )

    @contextmanager
    def redrawn(self, seed: int = 0) -> Iterator["LanguageModel"]:
        """Put the entries of each weight tensor in random order within the block, as an untrained baseline.

        The block gets a model that has these weights; after it, the weights are as before. They change in place, so this
        model itself must not be used in the block. Each tensor keeps its scale and distribution, and shared weights stay
        shared. With tensor parallelism, the entries stay in their part. Beside the weights, this takes up to 1 GB of memory,
        or as much as the weights if the writing weights are centred.

        Raises:
            ConfigError: weights are on the disk.

        Source: Heap, Lawson, Farnik and Aitchison 2025, Sparse autoencoders can interpret randomly initialized transformers,
        arXiv:2501.17727. Deviation: they draw each tensor from a Gaussian with its mean and variance.
        """
        self._check_weights()
        with _processing.shuffled_weights(self.module, seed, self._undo, copied=bool(self.processing)):
            redrawn = LanguageModel(self.module, self.tokenizer, name=f"{self.name}, weights shuffled")
            redrawn.tf32, redrawn.device_map = self.tf32, self.device_map
            yield redrawn.center_writing_weights_() if self.processing else redrawn

    def check_origin(self, origin: Origin) -> None:
        """Raise ConfigError if activations of this origin come from a model with other weight processing.

        An origin without a model and without processing always passes. If it names another model, a warning is logged once.
        """
        if origin.model is not None and not _is_same_model(origin.model, self.name):
            _say_model(self.name, origin.model)
        if origin.processing == self.processing or (origin.model is None and not origin.processing):
            return
        wanted = _processing.CENTER_WRITING_WEIGHTS in origin.processing
        raise ConfigError(
            f"the dictionary belongs to {origin.model or 'a model'} with processing {list(origin.processing)}; {self.name} was "
            f"loaded with {list(self.processing)}: use load_model(..., center_writing_weights={wanted})"
        )

    def warn_of_precision(self, origin: Origin) -> None:
        """Log once if activations of this origin were computed in another number type than this model computes in."""
        if origin.model is not None:
            _say_precision(self.name, self.precision, origin.precision)

    def hooks_of(self, dictionary: Any, hook: str | None = None) -> Hooks:
        """Return the hooks that a dictionary reads and writes in this model.

        Args:
            hook: Hook to read instead of the one that the dictionary names. An autoencoder also writes there.

        Raises:
            ConfigError: a port names no hook; `hook` is given for a dictionary that reads several hooks; the dictionary
                belongs to several models, or to one with other weight processing.
            HookError: this model lacks a hook.
        """
        ports = (*dictionary.reads, *dictionary.writes)
        self.check_origin(dictionary.origin.of(ports[0].model))
        if len(named := {name for port in ports for name in (port.model, port.minus)} - {None}) > 1:
            models = ", ".join(f"{name!r}: …" for name in sorted(named))
            raise ConfigError(
                f"the dictionary belongs to several models, not to {self.name} alone; give them all: {{{models}}}"
            )
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
        """Return one row for each text, cut at n_ctx, with padding on the right; or return token ids as rows.

        Args:
            texts: A string, strings, or a Path; or token ids [batch pos] or [pos] as tensor, array, lists, or a tokenizer's
                output. Token ids are not changed, except that padding on the left is removed if a mask marks it.
            attention_mask: For token ids: 1 at tokens, 0 at padding.
            prepend_bos: Put a BOS token in front of each text. Default: True if the tokenizer has one. A text that begins
                with the BOS token gets no second one.

        Raises:
            TextError: a text is empty or has no tokens; the model has no tokenizer; neither text nor token ids were given.
            ShapeError: the model cannot take these token ids, lengths or mask.
            ConfigError: prepend_bos is true and the tokenizer has no BOS token.
        """
        if isinstance(texts, TokenRows) and attention_mask is None:
            return texts
        ids = token_ids(texts, attention_mask)
        if ids is None:
            return prompt_rows(self, texts, prepend_bos=prepend_bos)
        self.check_ids(ids)
        self.warn_of_leading_pads(ids)
        moved = aligned(ids, self.pad_id)
        rows = TokenRows(moved.tokens, self.countable(moved.tokens), moved.length, ends_text=False)
        return rows if moved.length is None else rows._replace(keep=rows.keep & rows.holds_token)

    def _read(self, given: Given, attention_mask: Any, prepend_bos: bool | None) -> Aligned:
        """Return text or token ids as rows of token ids on the model's device."""
        ids = given if isinstance(given, Ids) else token_ids(given, attention_mask)
        if ids is None:
            rows = self.to_tokens(given, prepend_bos=prepend_bos)
            ids = Ids(rows.tokens, rows.holds_token)
        else:
            self.check_ids(ids)
            if not isinstance(given, Ids | TokenRows):
                self.warn_of_leading_pads(ids)
        moved = aligned(ids, self.pad_id)
        return Aligned(*(None if x is None else to_device(x, self.device) for x in moved))

    def _forward(self, rows: Aligned, **settings: Any) -> Any:
        """Run the module on rows. During the pass, splices see the rows in `_aligned`."""
        if rows.length is not None and not self.is_causal:
            holds = torch.arange(rows.tokens.shape[1], device=self.device) < rows.length[:, None]
            settings["attention_mask"] = holds.long()
        self._check_weights()
        before, self._aligned = self._aligned, rows
        try:
            with float32_products(self.tf32):
                return self.module(rows.tokens, use_cache=False, **settings)
        finally:
            self._aligned = before

    @cached_property
    def is_causal(self) -> bool:
        """True if no position reads a later one. A forward pass with two different last tokens tests this."""
        last = torch.arange(self.d_vocab)[-2:]
        tokens = torch.stack([torch.cat([torch.arange(3) % self.d_vocab, i[None]]) for i in last]).to(self.device)
        tokens = tokens[:, -self.n_ctx :]
        with torch.no_grad(), _hooks.alone():
            a, b = self.module(tokens, use_cache=False).logits[:, :-1].float()
        if not a.numel():
            return True
        differ = (a - b).abs() > 1e-3 * a.abs().max()  # false for NaN, which other checks refuse
        return not bool(differ.any())

    def check_causal(self, what: str) -> None:
        """Raise ConfigError if positions read later ones, so that the model does not predict the next token.

        Args:
            what: The task that needs next-token predictions, for the message.
        """
        if not self.is_causal:
            raise ConfigError(
                f"{what} needs a model that predicts the next token; in {type(self.module).__name__} every position reads the "
                "whole row"
            )

    @torch.no_grad()
    def run(
        self, texts: Given, hooks: Sequence[str] | str, *, attention_mask: Any = None, prepend_bos: bool | None = None
    ) -> dict[str, Float[Tensor, "batch pos d"]]:
        """Return the activations at hooks, by hook name. The forward pass ends at the deepest hook.

        Activations at padded positions have no meaning; `to_tokens(texts).keep` is true at the tokens that count. With an
        attention_mask, all other activations are those of the row without padding, on whichever side the padding is.

        Args:
            texts: Text or token ids; see `to_tokens`.
            hooks: transformer-lens hook names.
            attention_mask, prepend_bos: See `to_tokens`.

        Raises:
            HookError: the model lacks a hook (near matches are listed), or the value there is not [batch pos d].
            TextError, ShapeError, ConfigError: see `to_tokens`.
        """
        names = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
        points = [self.hook_point(name) for name in names]
        if not points:
            raise ConfigError("name at least one hook")
        rows = self._read(texts, attention_mask, prepend_bos)
        acts: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Any], None]:
            def visit(value: Any) -> None:
                x = _activation(name, value, rows.tokens).to(self.device)
                if len(acts.keys() | {name}) == len(points):
                    acts[name] = x
                    raise _Enough
                acts[name] = x.clone()  # some models overwrite it later: Falcon adds the attention's output to the MLP's

            return visit

        handles = [point.on_value(keep(point.name)) for point in points]
        try:
            self._forward(rows)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if missing := names - acts.keys():
            raise HookError(f"the forward pass of {type(self.module).__name__} never reached {', '.join(sorted(missing))}")
        return {name: rows.restored(acts[name]) for name in names}

    def logits(
        self,
        texts: Given,
        *,
        attention_mask: Any = None,
        prepend_bos: bool | None = None,
        differentiable: bool = False,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Return next-token logits, with all active splices applied.

        Args:
            texts: Text or token ids; see `to_tokens`.
            attention_mask, prepend_bos: See `to_tokens`. Logits at masked positions have no meaning.
            differentiable: Keep the graph back to the tensors that an active `replace` returned. The weights are frozen and
                get no gradient.

        Raises:
            TextError, ShapeError, ConfigError: see `to_tokens`.
        """
        rows = self._read(texts, attention_mask, prepend_bos)
        with torch.set_grad_enabled(differentiable):
            return rows.restored(self._forward(rows).logits)

    @contextmanager
    def replace(self, hook: str, new: Callable[[Float[Tensor, "batch pos d"]], Float[Tensor, "batch pos d"]]) -> Iterator[None]:
        """Replace the activation at `hook` by `new(activation)` within the block.

        Some modules, such as OPT's MLP, get the rows of a batch as one long row; `new` still gets [batch pos d]. Products in
        `new` are TF32 only if torch is set so, whatever the model's are.

        Raises:
            HookError: the model has no such hook, or the value there is not [batch pos d].
        """
        shape: list[int] = []  # [batch pos] of the current forward pass

        def note_shape(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            token_ids = args[0] if args else next(iter(kwargs.values()))
            shape[:] = token_ids.shape

        def apply(value: Tensor) -> Tensor:
            here = value.to(self.device)
            with outside_models():
                changed = new(here)
            return value if changed is here else changed.to(value.device)

        def visit(value: Any) -> Tensor | None:
            if isinstance(value, Tensor) and value.ndim == 3:
                return apply(value)
            if isinstance(value, Tensor) and value.ndim == 2 and len(shape) == 2 and len(value) == shape[0] * shape[1]:
                apart = rearrange(value, "(batch pos) d -> batch pos d", batch=shape[0])
                changed = apply(apart)
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
        dictionary: Reconstructor,
        edits: PositionedEdit | Sequence[PositionedEdit] = (),
        *,
        ports: PortNames = None,
        error_term: bool | None = None,
        hook: str | None = None,
        keep: Bool[Tensor, "batch pos"] | None = None,
    ) -> Iterator[None]:
        """Replace activations by the dictionary's reconstruction, or edit some of their codes, within the block.

        Without edits, the dictionary's output replaces the activation at each hook that it writes. With edits
        (`saelens_lite.interventions.edits`) the activation y there becomes y + Σ_i (new_i − old_i) W_dec[i]: it keeps its
        error term, so that only the edits change the model. A dictionary of several hooks reads them in a separate pass, in
        which nothing is replaced; edits that only add to codes (`saelens_lite.Add`) read nothing. A dictionary on another
        device is copied to the model's for the block; the copy is frozen.

        Positions on which dictionaries are not trained keep their activation unless an edit names them: special tokens,
        padding, and the positions that the dictionary's origin excludes, by default position 0.

        Args:
            ports: Keys or hooks of the write ports to change; default: all. With `saelens_lite.Add`, the ports of this model in
                a dictionary of several models do without the others; all else needs `Models.splice`.
            error_term: Keep the error term of the activation; False: apply edits to the reconstruction. Default: True with
                edits, False without.
            hook: Hook to read instead of the one that the dictionary names; see `hooks_of`.
            keep: Positions that may change, instead of the default above.

        Raises:
            HookError: this model lacks a hook of the dictionary, or computes the hook it writes before the one it reads.
            ConfigError: the dictionary belongs to a model with other weight processing, or to several models; a port names no
                hook, or does not exist; an edit names a latent that the dictionary does not have; a dictionary of several hooks
                is used in a pass with a cache.
            ShapeError: the dictionary and the hook differ in width; an edit names a position beyond the end of the row;
                `keep` and the tokens differ in shape.
        """
        with Splice(self, dictionary, edits, ports=ports, error_term=error_term, hook=hook, keep=keep).in_force():
            yield

    @contextmanager
    def in_whole_rows(self) -> Iterator[None]:
        """Make `generate` run the model on the whole row for each token, without a cache, within the block."""
        self.n_in_whole_rows += 1
        try:
            yield
        finally:
            self.n_in_whole_rows -= 1

    def as_run(self, mask: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Return a mask of the given rows as one of the rows of the current forward pass, which have no left padding."""
        return mask if self._aligned is None else self._aligned.moved(mask)

    def check_order(self, hook: str, target: str) -> None:
        """Raise HookError if the model computes `target` before `hook`, from which a dictionary predicts it."""
        met: list[str] = []

        def noting(name: str) -> Callable[[Tensor], Tensor]:
            return lambda x: (met.append(name), x)[1]

        with self.replace(hook, noting(hook)), self.replace(target, noting(target)):
            self.logits(torch.zeros(1, 1, dtype=torch.long))
        if met[:1] != [hook]:
            raise target_first(hook, target)

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
        Active splices act on every position as in a single pass over the whole text, with or without a key-value cache.

        Args:
            temperature: 0 takes the likeliest token each time.
            top_k: Draw from the k likeliest tokens; None: from all.
            prepend_bos: See `to_tokens`.

        Raises:
            ConfigError: the temperature is negative or not finite; top_k or max_new_tokens is below 1.
            TextError, ShapeError: the prompt is empty, or fills the model's context.
            NonFiniteError: the logits are NaN or infinite.
        """
        return _generation.generate(
            self, prompt, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed, prepend_bos=prepend_bos
        )

    @cached_property
    def has_usable_cache(self) -> bool:
        """True if passes with the model's key-value cache give the logits of a whole pass, tested on a few tokens.

        Otherwise generation recomputes the whole row for each new token.
        """
        with _hooks.alone():
            usable = _generation.cache_is_usable(self)
        if not usable:
            log.info("%s generates without a key-value cache: each new token takes a pass over the whole row", self.name)
        return usable

    def unembedding(self, *, fold_norm: bool = True) -> Float[Tensor, "d_vocab d_model"]:
        """Return W_U with the final norm's scale folded in; with fold_norm=False, return W_U itself.

        The dot product of a direction with a row is the direction's effect on that token's logit, up to the positive factor
        that the norm divides by and a shift common to all tokens. A projection between norm and head is multiplied in.
        Post-norm models have no final norm: there, effects are those of the last block's output, without the block's norms.

        Raises:
            ConfigError: there is more than a norm and a projection between the last block and the head.
        """
        weight = self._readout.weight().to(self.device)
        norm = self._final_norm
        if norm is None:
            log.warning("%s has no final norm: effects on logits are those of its last block's output", self.name)
        if norm is None or not fold_norm:
            return weight
        weight = weight * norm.scale.float().to(weight.device)
        return weight - weight.mean(1, keepdim=True) if norm.centres else weight

    def final_norm_divisor(self, x: Float[Tensor, "*shape d_model"]) -> Float[Tensor, "*shape"]:
        """Return the positive factor by which the final norm divides the last block's output x; 1 without such a norm.

        `x @ unembedding().T / final_norm_divisor(x)` are the logits up to terms that do not depend on x.
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
        """Return a transformer-lens TransformerBridge on a copy of this model, for tasks that these hooks do not cover.

        Raises:
            ConfigError: weights are on the disk or cut into parts.
        """
        self._needs_whole_weights("a bridge")
        from transformer_lens.model_bridge import TransformerBridge

        module = copy.deepcopy(self.module)  # the bridge switches it to eager attention and wraps its blocks
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


@cache
def _say_model(name: str, of_origin: str) -> None:
    log.warning(
        "the dictionary was trained on %s, but this model is called %s; on another model its numbers mean little",
        of_origin,
        name,
    )


def _is_same_model(one: str, other: str) -> bool:
    """Return whether two names can be of one model: gpt2, gpt2-small and openai-community/gpt2 are."""
    return Path(one).name == Path(other).name or Path(hub_id(one)).name == Path(hub_id(other)).name


@cache
def _say_precision(name: str, precision: str, of_origin: str | None) -> None:
    if precision == (of_origin or "float32"):
        return
    known = of_origin is not None or precision in ("bfloat16", "float16")  # else it may be older, of other tools, or float32
    log.log(
        logging.WARNING if known else logging.INFO,
        "%s computes in %s, but the dictionary was trained on activations in %s: numbers will differ slightly",
        name,
        precision,
        of_origin or "float32, or a type that is not recorded",
    )


def _n_positions(module: nn.Module) -> int | None:
    """Return the number of usable position embeddings if some are reserved for padding; else None.

    RoBERTa counts positions from padding_idx + 1, so the rows of its table up to padding_idx belong to no token.
    """
    for name, part in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            return part.num_embeddings - part.padding_idx - 1
    return None


def _activation(name: str, value: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d"]:
    """Return the value at a hook as activations. Raise HookError if its shape or dtype is not that of activations."""
    batch, pos = tokens.shape
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.ndim == 3 and value.shape[:2] in ((batch, pos), (1, pos)):  # position embeddings lack the batch
            return value.expand(batch, pos, -1)
        if value.ndim == 2 and len(value) == batch * pos:  # OPT's MLP
            return rearrange(value, "(batch pos) d -> batch pos d", batch=batch)
    raise HookError(f"{name} is {_shape(value)} for tokens [{batch} {pos}]; only activations [batch pos d] are captured")


def _shape(value: Any) -> str:
    """Return the shape or type of the value at a hook, for an error message."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
