"""The report of a model diff: numbers and a class for each latent, and how many latents each class has."""

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from saelens_lite.diffing.picture import save_picture
from saelens_lite.errors import ConfigError, CorruptFileError
from saelens_lite.files import MAX_LIST_BYTES, read_json, write_json
from saelens_lite.schemas import Checked, Count, Positive, Sha256, String, checked
from saelens_lite.tables import Result, grid, wrapped

FORMAT = 1
ONLY, SHARED, ENDS = 0.1, (0.4, 0.6), 1.0  # limits of Δ_norm
NEAR_0 = {"error": 0.2, "reconstruction": 0.5, "activation": 0.5}  # ν below these: the other model lacks the latent
SHOWN = 10  # latents of each specific class in the table
By = Literal["nu", "norm"]

CROSSCODER = (
    "frequency", "norm_base", "norm_tuned", "delta_norm", "cosine", "encoder_cosine", "beta_error_base", "beta_error_tuned",
    "beta_reconstruction_base", "beta_reconstruction_tuned", "nu_error", "nu_error_low", "nu_error_high", "nu_reconstruction",
    "nu_reconstruction_low", "nu_reconstruction_high", "mirror_error", "mirror_error_low", "mirror_error_high",
    "mirror_reconstruction", "mirror_reconstruction_low", "mirror_reconstruction_high",
)  # fmt: skip
DIFFERENCE = (
    "frequency", "norm", "beta_activation_base", "beta_activation_tuned", "nu_activation", "nu_activation_low",
    "nu_activation_high", "mirror_activation", "mirror_activation_low", "mirror_activation_high",
)  # fmt: skip


class DiffControl(Checked):
    """The result of a diff whose answer is known.

    `share_by_norm` and `share_by_nu` are the shares of the latents that are called specific to a model, among those that fire
    often enough. With a planted change, latents near to it (cosine of 0.7 or more) do not count: `cosine` is that of the
    nearest one, and `planted_by_norm` and `planted_by_nu` are its classes.
    """

    n_latents: Count
    share_by_norm: float | None = None
    share_by_nu: float
    cosine: float | None = None
    planted_by_norm: String | None = None
    planted_by_nu: String | None = None


class _File(Checked):
    """The content of a report's file."""

    format: Literal[1]
    base: String
    tuned: String
    place: String
    source: String
    n_tokens: Positive
    n_units: Positive
    units: String
    dictionary_sha256: Sha256
    values: dict[String, list[float | None]]
    controls: Annotated[dict[String, DiffControl], Field(max_length=100)] | None = None


@dataclass(frozen=True)
class DiffReport(Result):
    """The latents of a dictionary of two models: which are shared, and which does one model have alone.

    `base` and `tuned` are the names of the models. `values` has a tensor [d_sae] for each number; saelens_lite.diffing defines
    them. NaN stands for a number that cannot be given, such as the interval of a latent that fires too rarely. `place` names
    the ports, `source` the activations, and `units` says of what the `n_units` are that intervals are drawn over.
    `dictionary_sha256` is the hash of the dictionary (`codes_hash`), or in older reports of its weights alone.
    """

    base: str
    tuned: str
    values: dict[str, Float[Tensor, " d_sae"]]
    place: str
    source: str
    n_tokens: int
    n_units: int
    units: str
    dictionary_sha256: str
    controls: dict[str, DiffControl] | None = None

    def __getitem__(self, name: str) -> Float[Tensor, " d_sae"]:
        """Return a number of every latent, such as report["delta_norm"]."""
        if name not in self.values:
            raise ConfigError(f"the report has no {name!r}; it has {', '.join(self.values)}")
        return self.values[name]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self["frequency"])

    @property
    def is_of_differences(self) -> bool:
        """True for a dictionary of differences, whose latents have one direction and so no Δ_norm."""
        return "delta_norm" not in self.values

    @property
    def kinds(self) -> tuple[str, ...]:
        """The classes, such as "chat only", "base only", "shared", "other", "unknown"."""
        return (f"{self.tuned} only", f"{self.base} only", "shared", "other", "unknown")

    def classes(self, by: By = "nu") -> list[str]:
        """Return the class of each latent by latent scaling ("nu") or by decoder norms ("norm").

        Raises:
            ConfigError: a dictionary of differences has no classes by norm.
        """
        if by == "norm" and self.is_of_differences:
            raise ConfigError("by = 'norm' needs a direction in each model, and a dictionary of differences has one in all")
        tuned, base, shared, unknown = self._by_norm() if by == "norm" else self._by_nu()
        number = torch.full_like(self["frequency"], 3, dtype=torch.long)
        for i, mask in ((2, shared), (1, base), (0, tuned), (4, unknown)):
            number[mask] = i
        return [self.kinds[i] for i in number.tolist()]

    def _by_norm(self) -> tuple[Bool[Tensor, " d_sae"], ...]:
        delta = self["delta_norm"]
        shared = (delta >= SHARED[0]) & (delta <= SHARED[1])
        return delta < ONLY, delta > ENDS - ONLY, shared, (self["frequency"] == 0) | delta.isnan()

    def _by_nu(self) -> tuple[Bool[Tensor, " d_sae"], ...]:
        parts = ["activation"] if self.is_of_differences else ["error", "reconstruction"]
        tuned, base = (self._near_0(prefix, parts) for prefix in ("nu", "mirror"))
        if self.is_of_differences:
            both = torch.zeros_like(tuned)
        else:  # a direction that matters in one model may still have another direction in the other model
            larger = self["delta_norm"] < SHARED[0], self["delta_norm"] > SHARED[1]
            tuned, base = tuned & larger[0], base & larger[1]
            both = torch.stack([self[f"nu_{part}"] > NEAR_0["reconstruction"] for part in parts]).all(0)
            both &= torch.stack([self[f"mirror_{part}"] > NEAR_0["reconstruction"] for part in parts]).all(0)
        known = torch.stack([self._known(part) for part in parts]).all(0)
        return tuned, base, both, ~known

    def _near_0(self, prefix: str, parts: Sequence[str]) -> Bool[Tensor, " d_sae"]:
        ends = [self[f"{prefix}_{part}_{end}"].abs() < NEAR_0[part] for part in parts for end in ("low", "high")]
        return torch.stack(ends).all(0)

    def _known(self, part: str) -> Bool[Tensor, " d_sae"]:
        """Return where the ratio has an interval in the model of the larger norm; of a difference, in either model."""
        nu, mirror = (~self[f"{prefix}_{part}_high"].isnan() for prefix in ("nu", "mirror"))
        return nu | mirror if self.is_of_differences else torch.where(self["delta_norm"] <= 0.5, nu, mirror)

    def only(self, model: str, by: By = "nu") -> list[int]:
        """Return the latents that one model has alone, the most specific ones first.

        Raises:
            ConfigError: the report is of other models.
        """
        if model not in (self.base, self.tuned):
            raise ConfigError(f"{model!r} is none of the models, {self.base} and {self.tuned}")
        prefix = "nu" if model == self.tuned else "mirror"
        if by == "norm":
            order = self["delta_norm"] if model == self.tuned else -self["delta_norm"]
        else:
            order = torch.stack([x.abs() for name, x in self.values.items() if name.startswith(f"{prefix}_")]).amax(0)
        chosen = [i for i, name in enumerate(self.classes(by)) if name == f"{model} only"]
        return sorted(chosen, key=lambda i: (float(order[i]), i))

    def counts(self, by: By = "nu") -> dict[str, int]:
        """Return the number of latents in each class."""
        number = Counter(self.classes(by))
        return {name: number[name] for name in self.kinds}

    def share_specific(self, by: By = "nu", without: Collection[int] = ()) -> float:
        """Return the share of latents called specific to a model, among those that are not unknown; 0 if all are unknown.

        without: latents that do not count.
        """
        number = Counter(name for i, name in enumerate(self.classes(by)) if i not in without)
        known = number.total() - number["unknown"]
        return (number[self.kinds[0]] + number[self.kinds[1]]) / known if known else 0.0

    def columns(self) -> dict[str, list[Any]]:
        """Return a row for each latent, column by column: its classes and all numbers."""
        classes = {"class": self.classes()} | ({} if self.is_of_differences else {"class_by_norm": self.classes("norm")})
        return {"latent": list(range(self.d_sae))} | classes | {name: x.tolist() for name, x in self.values.items()}

    @property
    def where(self) -> str:
        """A sentence on the dictionary and the activations."""
        tokens = f"{self.n_tokens:,} tokens of {self.source} ({self.n_units:,} {self.units})"
        return f"{self.d_sae:,} latents of {self.place}, on {tokens}"

    @property
    def summary(self) -> str:
        """A few sentences that say what the counts mean."""
        number = self.counts()
        base, tuned = number[f"{self.base} only"], number[f"{self.tuned} only"]
        text = (
            f"By latent scaling, {tuned:,} latents are in {self.tuned} only, {base:,} in {self.base} only, and "
            f"{number['shared']:,} in both. "
        )
        if number["unknown"]:
            text += f"{number['unknown']:,} fire too rarely, or too irregularly, to tell. "
        if self.controls is None:
            return text + "How many of these are false alarms is not known: controls=True measures it."
        for name, control in self.controls.items():
            text += f"Control, {name}: {control.share_by_nu:.2%} of {control.n_latents:,} latents are called specific"
            if control.planted_by_nu is not None:
                text += f" besides the planted one, which is called {control.planted_by_nu} (cosine {control.cosine:.2f})"
            text += ". "
        return text.strip()

    def table(self) -> Any:
        """Return a rich group: the counts with and without controls, and the latents that are most specific to a model."""
        from rich.console import Group

        tables = [self._counts_table()]
        for model in (self.tuned, self.base):
            if chosen := self.only(model):
                tables.append(self._latents_table(model, chosen))
        return Group(*tables)

    def _counts_table(self) -> Any:
        rules: dict[str, By] = {"by ν": "nu"} if self.is_of_differences else {"by Δ_norm": "norm", "by ν": "nu"}
        counts = [self.counts(by) for by in rules.values()]
        rows: list[Any] = [(name, *(f"{one[name]:,}" for one in counts)) for name in self.kinds]
        for i, (name, control) in enumerate((self.controls or {}).items()):
            shares = [control.share_by_norm, control.share_by_nu][-len(rules) :]
            rows += [None] if not i else []
            rows.append((f"{name}: specific", *(f"{x:.2%}" if x is not None else "" for x in shares)))
            if control.planted_by_nu is not None:
                planted = [control.planted_by_norm, control.planted_by_nu][-len(rules) :]
                rows.append(("… the planted latent", *(str(x or "") for x in planted)))
        return grid(
            ("latents", *rules),
            rows,
            title=wrapped(self.where),
            caption=wrapped(self.summary),
            column=lambda title: {"justify": "left" if title == "latents" else "right"},
        )

    def _latents_table(self, model: str, chosen: Sequence[int]) -> Any:
        prefix = "nu" if model == self.tuned else "mirror"
        parts = {"ν": "activation"} if self.is_of_differences else {"ν^ε": "error", "ν^r": "reconstruction"}
        plain = {} if self.is_of_differences else {"Δ_norm": "delta_norm", "cosine": "cosine"}

        def cells(i: int) -> tuple[str, ...]:
            ratios = [[float(self[f"{prefix}_{part}{end}"][i]) for end in ("", "_low", "_high")] for part in parts.values()]
            shown = [f"{x:.2f} [{low:.2f}, {high:.2f}]" for x, low, high in ratios]
            return (f"{i}", *(f"{float(self[name][i]):.2f}" for name in plain.values()), *shown, _share(self["frequency"][i]))

        more = f", the first {SHOWN} of {len(chosen):,}" if len(chosen) > SHOWN else ""
        return grid(
            ("latent", *plain, *parts, "fires on"),
            [cells(i) for i in chosen[:SHOWN]],
            title=f"{model} only{more}",
            column=lambda title: {"justify": "right", "no_wrap": True},
            collapse_padding=True,
        )

    def plot(self, path: str | Path) -> Path:
        """Write a picture, .png or .svg: a histogram of Δ_norm and a scatter of ν^ε and ν^r; it replaces an earlier one.

        Raises:
            ConfigError: the file has another ending, or matplotlib is not installed.
        """
        return save_picture(self.values, self.classes(), (self.base, self.tuned), path)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data; None stands for NaN."""
        plain = {name: getattr(self, name) for name in _FACTS}
        values = {name: [_number(x) for x in column.tolist()] for name, column in self.values.items()}
        controls = {name: one.model_dump() for name, one in self.controls.items()} if self.controls is not None else None
        return {"format": FORMAT, **plain, "values": values, "controls": controls}

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON, and write it to `path` if that is given."""
        if path is not None:
            write_json(Path(path), self.to_dict(), limit=MAX_LIST_BYTES)
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_json(cls, path: str | Path) -> "DiffReport":
        """Return the report in a file that `to_json` wrote.

        Raises:
            CorruptFileError: the file is missing, damaged, or of another format.
        """
        said = checked(path, read_json(Path(path), limit=MAX_LIST_BYTES, finite=True), _File)
        known = next((names for names in (CROSSCODER, DIFFERENCE) if set(names) == said.values.keys()), None)
        if known is None or len({len(column) for column in said.values.values()}) != 1:
            raise CorruptFileError(f"{path} is damaged: its columns are not those of a diff, or differ in length")
        values = {name: torch.tensor([math.nan if x is None else x for x in said.values[name]]) for name in known}
        facts: Mapping[str, Any] = {name: getattr(said, name) for name in _FACTS}
        return cls(values=values, controls=said.controls, **facts)


_FACTS = ("base", "tuned", "place", "source", "n_tokens", "n_units", "units", "dictionary_sha256")


def _number(x: float) -> float | None:
    """Return a float32 number in its shortest form, None for NaN and infinity."""
    return float(f"{x:.9g}") if math.isfinite(x) else None


def _share(x: Any) -> str:
    return f"{float(x):.2%}" if float(x) >= 1e-4 else f"{float(x):.1e}"
