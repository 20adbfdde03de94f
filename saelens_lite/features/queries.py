"""The questions that a feature store answers, one latent at a time."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxtyping import Bool, Float
from torch import Tensor, isin, tensor

from saelens_lite.errors import ConfigError, UserError
from saelens_lite.features.codes import CodesTable
from saelens_lite.features.compare import Stability
from saelens_lite.features.explaining.scores import Kind, LabelScore
from saelens_lite.features.info import StoreInfo
from saelens_lite.features.label_scores import check_room, current, of_store, together
from saelens_lite.features.per_model import ModelTensors
from saelens_lite.features.rows import ExampleRow, GroupRate, Rows
from saelens_lite.features.summary import About, Example, ExampleGroup, LatentSummary, ModelSummary, Partner, PositionBin
from saelens_lite.features.tensors import NONE, FeatureTensors
from saelens_lite.features.weights import LatentWeights
from saelens_lite.tokens.display import Vocabulary


class StoreQueries:
    """The content of a feature store and the queries over it; `FeatureStore` adds building, files and pages."""

    def __init__(
        self,
        info: StoreInfo,
        tensors: FeatureTensors,
        weights: LatentWeights,
        vocabulary: list[str],
        *,
        codes: CodesTable | None = None,
        scores: Stability | None = None,
        control: "StoreQueries | None" = None,
        labels: dict[int, str] | None = None,
        folder: Path | None = None,
        rows: Rows | None = None,
        models: ModelTensors | None = None,
        label_scores: Mapping[int, Mapping[Kind, LabelScore]] | None = None,
    ):
        self.info, self.tensors, self.weights = info, tensors, weights
        self.vocabulary = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary(vocabulary)
        self.codes, self.scores, self.control, self.labels, self.folder = codes, scores, control, labels or {}, folder
        self.rows = rows  # only of activations without a model
        self.models = models  # only of several models
        self._label_scores = label_scores or {}  # also those of earlier labels

    @property
    def label_scores(self) -> dict[int, dict[Kind, LabelScore]]:
        """The scores of the labels, by latent and kind ("detection", "fuzzing"). Scores of earlier labels are left out."""
        return current(self._label_scores, self.labels)

    def scores_of(self, latent: int) -> list[LabelScore]:
        """Return the scores of a latent's label, first that of detection; none if the label was not scored.

        Raises:
            UserError: there is no such latent.
        """
        self._check(latent)
        return [one for one in self._label_scores.get(latent, {}).values() if one.label == self.labels.get(latent)]

    def record_scores(self, scores: Iterable[LabelScore]) -> int:
        """Add scores of labels, and return the number that was added. Call `write_scores` or `save` to keep them.

        They replace those of the same kind. A score of a text that is not the label of its latent is left out, and so is one
        on the contexts of another store.

        Raises:
            UserError: there is no such latent or kind, or a value is not between 0 and 1.
        """
        added = of_store((one for one in scores if self.labels.get(one.latent) == one.label), self.info)
        self._label_scores = together(self._label_scores, added, self.info.d_sae)
        return len(added)

    def check_room(self, more: Iterable[tuple[int, Kind]]) -> None:
        """Raise UserError if the store has no room for more scores, given by latent and kind."""
        check_room(self._label_scores, more)

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens (or rows) on which each latent fires."""
        return (self.tensors.count.double() / self.info.n_tokens).float()

    @property
    def never_fires(self) -> Bool[Tensor, " d_sae"]:
        """Mask of the latents that never fire on the text."""
        return self.tensors.count == 0

    @property
    def stability(self) -> Float[Tensor, " d_sae"] | None:
        """Score of each latent in other dictionaries (`sl.stability`), 0 for dead latents; None if it was not computed."""
        return None if self.scores is None else self.scores.score

    def top_examples(
        self, latent: int, *, one_per_group: bool = False, model: str | None = None
    ) -> list[Example] | list[ExampleRow]:
        """Return the contexts or rows in which a latent fires most, strongest first; none if it never fires.

        Args:
            one_per_group: Return at most one row of each group. Only for stores of activations with groups.
            model: Of several models, the one whose part in the latent's pre-activation decides the order, instead of the
                activation. Only contexts in which the latent fires are returned.

        Raises:
            UserError: there is no such latent or model, or there are no groups.
        """
        self._check(latent)
        if model is not None:
            m, at = self._of_models(model)
            return self._examples(m.best_place[latent, at], m.best_nearby[latent, at], m.best_part[latent, at])
        if one_per_group:
            t = self._groups().tensors
            return self.rows.examples(self.vocabulary, t.distinct_place[latent], t.distinct_value[latent])
        t = self.tensors
        return self._examples(t.top_place[latent], t.top_nearby[latent], self._parts("top_part", latent))

    def quantile_examples(self, latent: int) -> list[ExampleGroup]:
        """Return contexts drawn from groups of equally many activations, largest activations first.

        Raises:
            UserError: there is no such latent.
        """
        self._check(latent)
        t = self.tensors
        n, numbers = int(t.count[latent]), (t.group_count, t.group_low, t.group_high, t.group_place, t.group_nearby)
        parts = self._parts("group_part", latent)
        return [
            ExampleGroup(float(low), float(high), int(count) / n, self._examples(place, nearby, part))
            for count, low, high, place, nearby, part in zip(*(x[latent] for x in numbers), parts, strict=True)
            if count > 0
        ]

    def random_examples(self, latent: int) -> list[Example] | list[ExampleRow]:
        """Return contexts drawn from all activations of a latent, in the order of the text.

        Raises:
            UserError: there is no such latent.
        """
        self._check(latent)
        t = self.tensors
        return self._examples(t.random_place[latent], t.random_nearby[latent], self._parts("random_part", latent))

    def silent_examples(self, latent: int) -> list[Example] | list[ExampleRow]:
        """Return contexts drawn from those in which a latent does not fire; fewer than asked for if it nearly always fires.

        Raises:
            UserError: there is no such latent.
        """
        self._check(latent)
        place = self.tensors.silent_place[latent]
        nothing = self.tensors.top_nearby.new_zeros(len(place), sum(self.info.window) + 1)
        return self._examples(place, nothing, nothing[:, :0])

    def _parts(self, name: str, latent: int) -> Tensor:
        """Return the parts of several models at the contexts of a latent; of one model, as many empty lists."""
        if self.models is not None:
            return getattr(self.models, name)[latent]
        return getattr(self.tensors, name.replace("_part", "_nearby"))[latent, ..., :0]

    def _of_models(self, model: str) -> tuple[ModelTensors, int]:
        """Return the numbers about several models, and the number of one of them."""
        if self.models is None or model not in self.info.names:
            known = ", ".join(self.info.names) or "none with a name"
            raise UserError(f"the store has no model {model!r}; its models: {known}")
        return self.models, self.info.names.index(model)

    def _examples(self, places: Tensor, nearby: Tensor, parts: Tensor) -> list[Example] | list[ExampleRow]:
        """Return the contexts or rows at places, with the latent's activations there, and the parts of several models."""
        if self.rows is not None:
            return self.rows.examples(self.vocabulary, places, nearby[:, 0])
        t, (before, after) = self.tensors, self.info.window
        examples = []
        for place, around, part in zip(places.tolist(), nearby.tolist(), parts.tolist(), strict=True):
            if place != NONE:
                row, position = divmod(place, t.tokens.shape[1])
                start, stop = max(0, position - before), min(int(t.length[row]), position + after + 1)
                tokens = tuple(self.vocabulary.window(t.tokens[row, : int(t.length[row])], start, stop))
                first = start - (position - before)
                values = tuple(around[first : first + len(tokens)])
                each = dict(zip(self.info.names, part, strict=True)) if part else None
                examples.append(Example(tokens, values, position - start, around[before], row, position, each))
        return examples

    def group_profile(self, latent: int) -> list[GroupRate]:
        """Return the groups of rows in which a latent fires, with its firing rate and mean activation in each; at most ten.

        Those that the latent prefers most come first: the order is the evidence that it fires more often there than elsewhere.

        Raises:
            UserError: there is no such latent, or there are no groups.
        """
        self._check(latent)
        return self._groups().rates(latent)

    def _groups(self) -> Rows:
        if self.rows is None or not self.rows.labels:
            raise UserError("this store has no groups; build it with FeatureStore.from_activations and groups=")
        return self.rows

    def position_profile(self, latent: int) -> list[PositionBin]:
        """Return how often and how strongly a latent fires at positions 1, 2 to 3, 4 to 7, …, except where no token counts.

        Raises:
            UserError: there is no such latent, or the store was built from activations.
        """
        self.info.check_text("positions")
        self._check(latent)
        t = self.tensors
        columns = (t.band_low, t.band_high, t.band_tokens, t.band_count[latent], t.band_mean[latent])
        return [
            PositionBin(low, high, count / n, mean)
            for low, high, n, count, mean in zip(*(x.tolist() for x in columns), strict=True)
            if n
        ]

    def partners(self, latent: int, by: str = "pmi") -> list[Partner]:
        """Return the latents that fire together with a latent.

        In a store of more than about 4 million tokens, they are counted on a sample of so many (`info.partner_tokens`).

        Args:
            by: "pmi" for the largest pointwise mutual information among those that fire together on at least 5 tokens;
                "count" for the most tokens on which both fire.

        Raises:
            UserError: there is no such latent.
            ConfigError: `by` has another value.
        """
        self._check(latent)
        t = self.tensors
        lists = {"pmi": (t.specific_partner, t.specific_count), "count": (t.frequent_partner, t.frequent_count)}
        if by not in lists:
            raise ConfigError(f"by = {by!r}; expected pmi or count")
        n_tokens, own = self.info.n_tokens, int(t.count[latent])
        share = n_tokens / (self.info.partner_tokens or n_tokens)
        return [
            Partner(other, n, math.log(n * share * n_tokens / (own * int(t.count[other]))))
            for other, n in zip(*(x[latent].tolist() for x in lists[by]), strict=True)
            if other != NONE
        ]

    def promoted(self, latent: int, model: str | None = None) -> list[tuple[str, float]]:
        """Return the tokens whose logits a latent raises most, with the increase for each unit of its activation.

        This is the direct effect, which bypasses all later layers. The factor by which the final norm divides is left out.

        Args:
            model: One of several models, whose own direction and unembedding are used. Default: that of the last port that is
                written.
        """
        return self._effects(latent, "promoted", model)

    def suppressed(self, latent: int, model: str | None = None) -> list[tuple[str, float]]:
        """Return the tokens whose logits a latent lowers most; see `promoted`."""
        return self._effects(latent, "suppressed", model)

    def similar(self, latent: int) -> list[tuple[int, float]]:
        """Return the latents whose directions are nearest to that of a latent, with the cosine, nearest first."""
        self._check(latent)
        w = self.weights
        return list(zip(w.decoder_neighbours[latent].tolist(), w.decoder_cosine[latent].tolist(), strict=True))

    def about(self, latent: int) -> About:
        """Return the label of a latent, the token that it promotes most, and its largest activation."""
        self._check(latent)
        promoted = self.weights.promoted[latent, :1].tolist()
        return About(
            self.labels.get(latent),
            self.vocabulary[promoted[0]] if promoted else None,
            float(self.tensors.top_value[latent, 0]),
        )

    def strength(self, latent: int, times: float | int) -> float:
        """Return a multiple of a latent's largest activation, for edits and doses of natural size.

        `sl.Clamp(138, store.strength(138, 2))` sets the code to twice the largest of the store.

        Raises:
            UserError: there is no such latent, or it never fires on the text of the store.
        """
        if not (largest := self.about(latent).max) > 0:
            raise UserError(f"latent {latent} never fires on the text of the store, so it has no maximum; give a number")
        return times * largest

    def promoting(self, token: str) -> list[tuple[int, float]]:
        """Return the latents that have a token among their `promoted`, with the effect on its logit, largest first.

        Raises:
            UserError: the model has no such token. Most words begin with a space.
        """
        self.info.check_text("effects on tokens")
        ids = self.vocabulary.ids_of(token)
        if not ids:
            raise UserError(f"{token!r} is not a token of {self.info.model}{self.vocabulary.hint(token)}")
        latent, rank = isin(self.weights.promoted, tensor(ids)).nonzero(as_tuple=True)
        pairs = zip(latent.tolist(), self.weights.promoted_effect[latent, rank].tolist(), strict=True)
        return sorted(pairs, key=lambda pair: -pair[1])

    def _effects(self, latent: int, which: str, model: str | None) -> list[tuple[str, float]]:
        self.info.check_text("effects on tokens")
        self._check(latent)
        tensors, at = self.weights, latent
        if model is not None:
            tensors, place = self._of_models(model)
            at = latent, place
        ids, effects = (getattr(tensors, name)[at].tolist() for name in (which, f"{which}_effect"))
        return [(self.vocabulary[i], effect) for i, effect in zip(ids, effects, strict=True)]

    def _summaries(self, latent: int) -> list[ModelSummary]:
        """Return the facts about each of several models."""
        return [
            ModelSummary(
                name,
                float(self.models.norm[latent, at]),
                float(self.models.mean_part[latent, at]),
                self.promoted(latent, name),
                self.suppressed(latent, name),
                self.top_examples(latent, model=name),
            )
            for at, name in enumerate(self.info.names)
        ]

    def latent(self, latent: int) -> LatentSummary:
        """Return a summary of one latent. Raise UserError if there is no such latent."""
        self._check(latent)
        t, has_text = self.tensors, self.rows is None
        return LatentSummary(
            latent=latent,
            label=self.labels.get(latent),
            count=int(t.count[latent]),
            density=int(t.count[latent]) / self.info.n_tokens,
            max=float(t.top_value[latent, 0]),
            **{name: float(getattr(t, name)[latent]) for name in ("mean", "std", "skew", "kurtosis", "bin_width")},
            histogram=t.histogram[latent].tolist(),
            promoted=self.promoted(latent) if has_text else [],
            suppressed=self.suppressed(latent) if has_text else [],
            examples=self.top_examples(latent),
            groups=self.quantile_examples(latent),
            random=self.random_examples(latent),
            positions=self.position_profile(latent) if has_text else [],
            partners=self.partners(latent),
            stability=self._stability(latent),
            similar=self.similar(latent),
            rates=[] if has_text else self.rows.rates(latent),
            models=self._summaries(latent),
            delta_norm=self._compared("delta_norm", latent),
            cosine=self._compared("cosine", latent),
            scores=self.scores_of(latent),
        )

    def _compared(self, name: str, latent: int) -> float | None:
        """Return a number that compares two models; None if the store is not of two models with directions of their own."""
        numbers = () if self.models is None else getattr(self.models, name)
        return float(numbers[latent]) if len(numbers) else None

    def _stability(self, latent: int) -> float | None:
        """Return the stability score of a latent; None without scores, or if the latent was dead when they were computed."""
        return float(self.scores.score[latent]) if self.scores is not None and self.scores.live[latent] else None

    def _check(self, latent: int) -> None:
        if not 0 <= latent < self.info.d_sae:
            raise UserError(f"no latent {latent}; this dictionary has latents 0 to {self.info.d_sae - 1}")
