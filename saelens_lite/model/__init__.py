"""A frozen language model whose residual stream can be read and written by transformer-lens hook names."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saelens_lite.config import TextConfig
from saelens_lite.errors import ConfigError, ModelNotFoundError, ShapeError, TextError
from saelens_lite.model import hooks as _hooks
from saelens_lite.tokens import TokenRows, token_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EMBEDDED", "LanguageModel", "load_model"]

EMBEDDED = {"tiny": files("saelens_lite") / "data" / "tiny"}
log = logging.getLogger(__name__)


@runtime_checkable
class Reconstructor(Protocol):
    """What `LanguageModel.splice` needs of a dictionary."""

    origin: Any

    def __call__(self, x: Tensor) -> Tensor: ...

    def check_input(self, x: Tensor) -> None: ...


class _Enough(Exception):
    """Raised inside a hook to end a forward pass whose remaining blocks nobody needs."""


def load_model(
    name: str | Path = "tiny",
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> "LanguageModel":
    """A causal language model, frozen, in evaluation mode.

    `name` is "tiny" (embedded, no network), a local folder, or a Hugging Face Hub id such as "gpt2". `device` defaults to
    CUDA where there is one.

    Raises:
        ModelNotFoundError: no such model, no network, or an architecture transformers does not know.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    where = EMBEDDED.get(str(name)) or (Path(name).expanduser() if str(name).startswith("~") else name)
    local = Path(str(where)).is_dir()
    if not local and (isinstance(name, Path) or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1):
        raise ModelNotFoundError(f"no model folder at {name}; give a folder with config.json, a Hub id, or 'tiny'")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        module = AutoModelForCausalLM.from_pretrained(str(where), dtype=dtype, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(str(where), revision=revision)
    except Exception as error:  # transformers raises errors of many kinds for a damaged folder
        reason = " ".join(str(error).split())
        help_ = "check the folder" if local else "without a network use 'tiny' or a local folder with the model's files"
        raise ModelNotFoundError(f"cannot load the model {str(name)!r}: {help_}. transformers says: {reason[:400]}") from error
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    commit = getattr(module.config, "_commit_hash", None) or revision
    return LanguageModel(module.to(device), tokenizer, name=str(name), revision=commit)


class LanguageModel:
    """A transformers model and its tokenizer; make one with `load_model`, or wrap a module of your own."""

    def __init__(
        self, module: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, name: str, revision: str | None = None
    ):
        self.module = module.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name, self.revision = name, revision
        config = module.config.get_text_config()
        self.d_model: int = config.hidden_size
        self.n_layers: int = config.num_hidden_layers
        self.n_ctx: int = config.max_position_embeddings
        self.d_vocab: int = config.vocab_size
        self.bos_id: int | None = next(
            (i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None
        )  # GPT-2's tokenizer has <|endoftext|> for both
        self._offset = 0  # position of the first token of the current forward pass; not 0 while generating with a cache

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return self.module.dtype

    @cached_property
    def _mapping(self) -> dict[str, Any]:
        return _hooks.component_mapping(self.module, self.name)

    @property
    def hook_names(self) -> list[str]:
        """The residual-stream and sublayer hooks, in the order of the forward pass."""
        return _hooks.all_names(self.module, self._mapping)

    def hook_point(self, name: str) -> _hooks.HookPoint:
        """The module and side a hook name stands for; HookError with near matches when there is none."""
        return _hooks.resolve(name, self.module, self._mapping)

    def to_tokens(self, texts: str | Sequence[str], *, prepend_bos: bool = True) -> TokenRows:
        """One row a text, right-padded, cut at n_ctx.

        Raises:
            TextError: a text is empty.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(text for text in texts):
            raise TextError("empty text: every text needs at least one character")
        return token_rows(self, texts, prepend_bos=prepend_bos, text_config=TextConfig(truncate=True))

    def _as_tokens(self, texts: "str | Sequence[str] | Tensor | TokenRows") -> Int[Tensor, "batch pos"]:
        if isinstance(texts, TokenRows):
            tokens = texts.tokens
        elif isinstance(texts, Tensor):
            tokens = texts[None] if texts.ndim == 1 else texts
        else:
            tokens = self.to_tokens(texts).tokens
        if tokens.ndim != 2 or not tokens.numel():
            raise ShapeError(f"tokens have shape {tuple(tokens.shape)}; expected [batch pos] with at least one token")
        if tokens.shape[1] > self.n_ctx:
            raise ShapeError(f"rows of {tokens.shape[1]} tokens; {self.name} takes at most {self.n_ctx}")
        if tokens.is_floating_point() or int(tokens.max()) >= self.d_vocab or int(tokens.min()) < 0:
            raise ShapeError(f"token ids must be integers from 0 to {self.d_vocab - 1}; found {tokens.min()} … {tokens.max()}")
        return tokens.to(self.device)

    @torch.no_grad()
    def run(
        self, texts: "str | Sequence[str] | Tensor | TokenRows", hooks: Sequence[str] | str
    ) -> dict[str, Float[Tensor, "batch pos d"]]:
        """Activations at hooks; the forward pass ends at the deepest of them.

        `texts` are strings (tokenised with a BOS token in front, right-padded) or token ids [batch pos]. Attention is
        causal, so padding on the right changes nothing before it; activations at padded positions mean nothing, and
        `to_tokens(texts).keep` tells which those are.

        Raises:
            HookError: a hook the model does not have (near matches listed).
            TextError, ShapeError: empty text; token ids or lengths the model cannot take.
        """
        names = [hooks] if isinstance(hooks, str) else list(dict.fromkeys(hooks))
        points = [self.hook_point(name) for name in names]
        if not points:
            raise ConfigError("name at least one hook")
        tokens = self._as_tokens(texts)
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Tensor], None]:
            def visit(value: Tensor) -> None:
                found[name] = value.detach()
                if len(found) == len(points):
                    raise _Enough

            return visit

        handles = [point.on_value(keep(point.name)) for point in points]
        try:
            inner = set(self.module.base_model.modules())
            stop_early = all(point.module in inner for point in points)  # the unembedding lies outside
            (self.module.base_model if stop_early else self.module)(tokens, use_cache=False)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {name: found[name] for name in names}

    @torch.no_grad()
    def logits(self, texts: "str | Sequence[str] | Tensor | TokenRows") -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits; a splice in force is seen by them."""
        return self.module(self._as_tokens(texts), use_cache=False).logits

    @contextmanager
    def replace(self, hook: str, new: Callable[[Float[Tensor, "batch pos d"]], Float[Tensor, "batch pos d"]]) -> Iterator[None]:
        """Within the block, the activation at `hook` is replaced by `new(activation)`."""
        handle = self.hook_point(hook).on_value(new)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def splice(
        self,
        dictionary: "Reconstructor",
        *,
        hook: str | None = None,
        keep: Bool[Tensor, "batch pos"] | None = None,
    ) -> Iterator[None]:
        """Within the block, the stream at the dictionary's hook is its reconstruction.

        Positions the dictionary was never trained on (by default position 0) keep their activation; `keep` chooses the
        replaced positions instead.

        Raises:
            HookError: neither the dictionary nor `hook` names a hook of this model.
            ShapeError: the dictionary has another width than the hook.
        """
        name = hook or dictionary.origin.hook
        if name is None:
            raise ConfigError("the dictionary does not say which hook it belongs to; give hook=")

        def reconstruct(x: Tensor) -> Tensor:
            dictionary.check_input(x)
            chosen = keep
            if chosen is None:
                position = torch.arange(x.shape[1], device=x.device) + self._offset
                excluded = torch.tensor(dictionary.origin.excluded_positions, device=x.device, dtype=position.dtype)
                chosen = ~torch.isin(position, excluded)
            return torch.where(chosen.to(x.device)[..., None], dictionary(x).to(x.dtype), x)

        with self.replace(name, reconstruct):
            yield

    @torch.no_grad()
    def generate(
        self, prompt: str, max_new_tokens: int = 50, *, temperature: float | int = 0.8, top_k: int | None = 50, seed: int = 0
    ) -> str:
        """The prompt and its continuation; temperature 0 takes the likeliest token each time.

        Raises:
            ConfigError: a negative temperature.
            TextError, ShapeError: an empty prompt, or one that fills the model's context.
        """
        if temperature < 0:
            raise ConfigError(f"temperature = {temperature}; expected 0 or more")
        length = len(self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
        if length >= self.n_ctx:
            raise ShapeError(f"the prompt has {length} tokens; {self.name} reads at most {self.n_ctx} with the BOS token")
        tokens = self._as_tokens(prompt)
        n_new = min(max_new_tokens, self.n_ctx - tokens.shape[1])
        generator = torch.Generator(self.device).manual_seed(seed)
        past, step_input = None, tokens
        try:
            for _ in range(n_new):
                out = self.module(step_input, past_key_values=past, use_cache=True)
                past, logits = out.past_key_values, out.logits[:, -1].float()
                self._offset += step_input.shape[1]
                if temperature == 0:
                    step_input = logits.argmax(-1, keepdim=True)
                else:
                    if top_k is not None:
                        floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                        logits = logits.masked_fill(logits < floor, -torch.inf)
                    step_input = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                tokens = torch.cat([tokens, step_input], dim=1)
        finally:
            self._offset = 0
        ids = tokens[0].tolist()
        return self.tokenizer.decode(ids[1:] if ids[0] == self.bos_id else ids)

    def unembedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """W_U with the final norm's scale folded in, so that a direction's dot product with a row is its effect on that
        token's logit, up to the positive factor the norm divides by and a shift common to all tokens."""
        head = self.module.get_output_embeddings().weight.float()
        final_norm = self._mapping.get("ln_final")
        if final_norm is None:
            return head
        norm: nn.Module = self.module.get_submodule(final_norm.name)
        scale = norm.weight.float()
        if "gemma" in type(self.module).__name__.lower():  # Gemma's norm multiplies by 1 + weight
            scale = 1 + scale
        head = head * scale
        return head - head.mean(1, keepdim=True) if isinstance(norm, nn.LayerNorm) else head

    def token_strings(self) -> list[str]:
        """The text of every token id."""
        return self.tokenizer.batch_decode([[i] for i in range(self.d_vocab)], clean_up_tokenization_spaces=False)

    def bridge(self) -> Any:
        """transformer-lens's TransformerBridge on a copy of this model, for everything hooks here do not cover."""
        import copy

        from transformer_lens.model_bridge import TransformerBridge

        where = str(EMBEDDED.get(self.name, self.name))
        return TransformerBridge.boot_transformers(
            where, hf_model=copy.deepcopy(self.module), tokenizer=copy.deepcopy(self.tokenizer), device=str(self.device)
        )

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.module.parameters())
        return (
            f"LanguageModel({self.name!r}, {type(self.module).__name__}, {n / 1e6:.1f} M parameters, {self.n_layers} layers, "
            f"d_model {self.d_model}, n_ctx {self.n_ctx}, {self.d_vocab} tokens, {self.device}, {str(self.dtype)[6:]})"
        )
