"""What the latents of a dictionary stand for: collected in one pass over a text, asked for one by one, shown as a page."""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

from jaxtyping import Bool, Float, jaxtyped
from torch import Tensor

from saelens_lite.dictionary import Dictionary, read_tensors
from saelens_lite.errors import ConfigError, CorruptFileError, OutputExistsError, TextError, UserError
from saelens_lite.features.store import N_BINS, FeatureTensors, StoreInfo, collect, vocabulary, weights_hash
from saelens_lite.files import new_folder, read_json, refuse_existing, write_json, write_text
from saelens_lite.model import LanguageModel
from saelens_lite.tokens import Text, TokenRows, text_hash, token_rows

__all__ = ["Example", "FeatureStore", "FeatureTensors", "LatentSummary", "StoreInfo", "weights_hash"]

FORMAT = 1
INFO_FILE, TENSORS_FILE = "features.json", "features.safetensors"


class Example(NamedTuple):
    """A context, and a latent's activation at each of its tokens; tokens[peak] stands at `position` of row `row`."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int
    value: float
    row: int
    position: int


class LatentSummary(NamedTuple):
    """One latent; bin j of the histogram counts activations in [j · bin_width, (j + 1) · bin_width)."""

    latent: int
    count: int
    density: float
    max: float
    mean: float
    histogram: list[int]
    bin_width: float
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]
    examples: list[Example]


class FeatureStore:
    """Everything there is to show about the latents of one dictionary; make one with `build` or `load`.

    A latent fires where its code is above zero.
    """

    def __init__(self, info: StoreInfo, tensors: FeatureTensors, vocabulary: list[str]):
        self.info, self.tensors, self.vocabulary = info, tensors, vocabulary

    @classmethod
    def build(
        cls,
        dictionary: Dictionary,
        lm: LanguageModel,
        text: Text | TokenRows,
        *,
        hook: str | None = None,
        out: str | Path | None = None,
        top_n: int = 10,
        window: tuple[int, int] = (12, 6),
        n_tokens: int | None = None,
        batch_tokens: int = 8192,
        exists: Literal["error", "overwrite"] = "error",
    ) -> "FeatureStore":
        """The store of a dictionary, from one pass over the text; also written to the folder `out` when given.

        Text is cut into rows as the dictionary's training text was. Each of the `top_n` contexts of a latent comes from
        another row; of equal activations the earlier is taken. `window` counts the tokens shown before and after.

        Raises:
            ConfigError: no hook is named; another processing of the model; a bad `top_n` or `window`; `n_tokens` with rows.
            HookError, ShapeError, TextError: a hook the model lacks, a width that does not fit, no text.
            OutputExistsError: `out` holds something and `exists` is "error".
            NonFiniteError: activations or codes are NaN or infinite.
        """
        if out is not None:
            refuse_existing(Path(out), exists)
        hook = hook or dictionary.origin.hook
        if hook is None:
            raise ConfigError("the dictionary does not say which hook it belongs to; give hook=")
        lm.hook_point(hook)
        lm.check_origin(dictionary.origin)
        rows = _rows(dictionary, lm, text, n_tokens)
        info = StoreInfo(
            model=lm.name,
            revision=lm.revision,
            hook=hook,
            rule=dictionary.rule.plugin_name,
            d_sae=dictionary.d_sae,
            n_tokens=rows.n_kept,
            top_n=top_n,
            window=window,
            bos_id=lm.bos_id,
            text_sha256=text_hash(rows),
            dictionary_sha256=weights_hash(dictionary),
        )
        store = cls(info, collect(dictionary, lm, rows, info, batch_tokens), vocabulary(lm))
        if out is not None:
            store.save(out, exists=exists)
        return store

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens on which each latent fires."""
        return (self.tensors.count.double() / self.info.n_tokens).float()

    @property
    def never_fires(self) -> Bool[Tensor, " d_sae"]:
        """Which latents did not fire once on the text."""
        return self.tensors.count == 0

    def top_examples(self, latent: int) -> list[Example]:
        """The contexts in which a latent fires most, best first; empty when it never fires.

        Raises:
            UserError: there is no such latent.
        """
        self._check(latent)
        t, (before, after) = self.tensors, self.info.window
        examples = []
        for value, place, nearby in zip(*(x[latent].tolist() for x in (t.top_value, t.top_place, t.top_nearby)), strict=True):
            if value > 0:
                row, position = divmod(place, t.tokens.shape[1])
                start, stop = max(0, position - before), min(int(t.length[row]), position + after + 1)
                tokens = tuple(self.vocabulary[i] for i in t.tokens[row, start:stop].tolist())
                first = start - (position - before)
                values = tuple(nearby[first : first + len(tokens)])
                examples.append(Example(tokens, values, position - start, value, row, position))
        return examples

    def promoted(self, latent: int) -> list[tuple[str, float]]:
        """The tokens whose logits a latent raises most, and by how much for each unit of its activation."""
        return self._effects(latent, self.tensors.promoted, self.tensors.promoted_effect)

    def suppressed(self, latent: int) -> list[tuple[str, float]]:
        """The tokens whose logits a latent lowers most, and by how much for each unit of its activation."""
        return self._effects(latent, self.tensors.suppressed, self.tensors.suppressed_effect)

    def _effects(self, latent: int, ids: Tensor, effects: Tensor) -> list[tuple[str, float]]:
        self._check(latent)
        return [(self.vocabulary[i], effect) for i, effect in zip(ids[latent].tolist(), effects[latent].tolist(), strict=True)]

    def latent(self, latent: int) -> LatentSummary:
        """All there is to know about one latent; UserError when there is no such latent."""
        self._check(latent)
        t = self.tensors
        return LatentSummary(
            latent=latent,
            count=int(t.count[latent]),
            density=int(t.count[latent]) / self.info.n_tokens,
            max=float(t.top_value[latent, 0]),
            mean=float(t.mean[latent]),
            histogram=t.histogram[latent].tolist(),
            bin_width=float(t.bin_width[latent]),
            promoted=self.promoted(latent),
            suppressed=self.suppressed(latent),
            examples=self.top_examples(latent),
        )

    def _check(self, latent: int) -> None:
        if not 0 <= latent < self.info.d_sae:
            raise UserError(f"no latent {latent}; this dictionary has latents 0 to {self.info.d_sae - 1}")

    def save(self, folder: str | Path, *, exists: Literal["error", "overwrite"] = "error") -> Path:
        """Write the store as a folder, which appears whole or not at all; its path.

        Raises:
            OutputExistsError: the folder holds something and `exists` is "error".
        """
        from safetensors.torch import save_file

        with new_folder(Path(folder), exists) as new:
            save_file({name: x.contiguous() for name, x in self.tensors._asdict().items()}, new / TENSORS_FILE)
            content = {
                "format": FORMAT,
                "tensors_sha256": _sha256(new / TENSORS_FILE),
                "info": self.info.model_dump(mode="json"),
                "vocabulary": self.vocabulary,
            }
            write_json(new / INFO_FILE, content)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "FeatureStore":
        """The store in a folder written by `save`.

        Raises:
            CorruptFileError: a file is missing, truncated or damaged, or the two do not belong together.
        """
        folder = Path(folder)
        content = read_json(folder / INFO_FILE)
        if content.get("format") != FORMAT:
            raise CorruptFileError(f"{folder / INFO_FILE}: format {content.get('format')!r}, this version reads {FORMAT}")
        tensors = read_tensors(folder / TENSORS_FILE)
        if content.get("tensors_sha256") != _sha256(folder / TENSORS_FILE):
            raise CorruptFileError(f"{folder / TENSORS_FILE} does not match the checksum in {INFO_FILE}; build the store again")
        try:
            store = cls(StoreInfo(**content["info"]), FeatureTensors(**tensors), list(content["vocabulary"]))
        except (KeyError, TypeError, ConfigError) as error:
            raise CorruptFileError(f"{folder} is damaged: {type(error).__name__}: {error}") from None
        if not _fits(store):
            raise CorruptFileError(f"{folder}: {TENSORS_FILE} and {INFO_FILE} do not fit together; build the store again")
        return store

    def dashboard(self, path: str | Path = "features.html", *, exists: Literal["error", "overwrite"] = "error") -> Path:
        """Write the store as one HTML page that needs no network; its path.

        Raises:
            OutputExistsError: the file exists and `exists` is "error", or it is a folder.
        """
        from saelens_lite.features.dashboard import render

        path = Path(path)
        if path.is_dir():
            raise OutputExistsError(f"{path} is a folder; name a file, such as {path / 'features.html'}")
        refuse_existing(path, exists)
        page = render(self)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
        return path

    def __repr__(self) -> str:
        i = self.info
        silent = int(self.never_fires.sum())
        return f"FeatureStore({i.d_sae} latents, {i.rule}, {i.model}, {i.hook}, {i.n_tokens:,} tokens, {silent} never fire)"


def _rows(dictionary: Dictionary, lm: LanguageModel, text: Text | TokenRows, n_tokens: int | None) -> TokenRows:
    """Token rows like those the dictionary was trained on, on the CPU."""
    if not isinstance(text, TokenRows):
        origin = dictionary.origin
        n_ctx = min(origin.n_ctx or lm.n_ctx, lm.n_ctx)
        return token_rows(lm, text, n_ctx=n_ctx, n_tokens=n_tokens, prepend_bos=origin.prepend_bos is not False)
    if n_tokens is not None:
        raise ConfigError("n_tokens limits text that is still to be cut into rows; take fewer token rows instead")
    if not text.n_kept:
        raise TextError("none of the positions of the token rows counts")
    return TokenRows(text.tokens.cpu(), text.keep.cpu())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fits(store: FeatureStore) -> bool:
    """Whether types and shapes agree with each other and with the info, and every token id and place exists."""
    info, t, n_vocab = store.info, store.tensors, len(store.vocabulary)
    with jaxtyped("context"):
        consistent = all(isinstance(tensor, FeatureTensors.__annotations__[name]) for name, tensor in t._asdict().items())
    sizes = (info.d_sae, info.top_n, sum(info.window) + 1)
    if not consistent or t.top_nearby.shape != sizes or t.histogram.shape[1] != N_BINS:
        return False
    limits = [(t.tokens, n_vocab), (t.promoted, n_vocab), (t.suppressed, n_vocab), (t.top_place, t.tokens.numel())]
    inside = all(int(ids.min()) >= 0 and int(ids.max()) < limit for ids, limit in limits if ids.numel())
    return inside and all(isinstance(text, str) for text in store.vocabulary)
