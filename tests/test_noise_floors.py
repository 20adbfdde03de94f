"""Noise floors against scipy's distributions, formulas in float64, and simulated tables of which the truth is known."""

import copy
import inspect
import json
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError, ShapeError
from saelens_lite.evaluation import EvalReport, Metric, noise_floors, table
from saelens_lite.evaluation.comparison import ComparedScores
from saelens_lite.evaluation.controls import PERMUTED, further_controls, permuted_dictionary
from saelens_lite.evaluation.floors import Noise, floor_of, noise_floors_of, t_quantile
from saelens_lite.evaluation.metrics import alive_values, latent_metrics
from saelens_lite.evaluation.probing import Probe, ProbeReport, probe_table
from saelens_lite.evaluation.replicates import KEPT, Recipe, Replicates, recipe_of
from saelens_lite.evaluation.sums import PooledSums, poisson_weights
from saelens_lite.features.compare import compare_all, comparison_table, shared_floors
from saelens_lite.seeds import mixed_seed
from saelens_lite.tables import as_text

METRICS = ("fvu", "ce_loss_score")


@pytest.mark.parametrize("df", [1.0, 2.0, 3.5, 12.0, 199.0, math.inf])
@pytest.mark.parametrize("p", [0.975, 0.995])
def test_quantiles_of_t_are_those_of_scipy(df, p):
    assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-3)


@pytest.mark.parametrize(("n_rows", "n_seeds"), [(2, 2), (3, 3), (5, 4)])
def test_with_seeds_alone_the_floor_is_that_of_tukeys_test(n_rows, n_seeds):
    df = float(n_rows * (n_seeds - 1))
    noise = Noise(np.zeros((n_rows, n_rows)), math.inf, (n_seeds,) * n_rows, 0.3**2, df)
    wanted = stats.studentized_range.ppf(0.95, n_rows, df) * 0.3 / n_seeds**0.5
    assert floor_of(noise) == pytest.approx(wanted, rel=0.03)


def test_text_alone_gives_a_paired_t_test_and_shared_noise_has_no_effect():
    covariance = np.array([[2.0, 1.9], [1.9, 2.1]])
    wanted = math.sqrt(2.0 + 2.1 - 3.8) * stats.t.ppf(0.975, 9)
    assert floor_of(Noise(covariance, 9.0, (1, 1))) == pytest.approx(wanted, rel=1e-3)
    three = np.eye(3)
    assert floor_of(Noise(three + 50, 30.0, (1, 1, 1))) == pytest.approx(floor_of(Noise(three, 30.0, (1, 1, 1))), rel=1e-6)


def test_columns_share_the_level_and_exact_ones_take_no_share():
    noisy, exact = Noise(np.eye(2), math.inf, (1, 1)), Noise(np.zeros((2, 2)), math.inf, (1, 1))
    floors = noise_floors_of({"a": noisy, "b": noisy, "c": exact})
    assert floors["a"] == floors["b"] == pytest.approx(math.sqrt(2) * stats.norm.ppf(1 - 0.025 / 2), rel=1e-3)
    assert floors["c"] == 0


class Simulated(NamedTuple):
    """A report of which everything is drawn."""

    metrics: dict[str, Metric]
    replicates: Replicates | None
    recipe: Recipe | None
    n_sequences: int


def drawn(generator: np.random.Generator, means: list[float], n_seeds: int, n_sequences: int, spread: float) -> dict:
    """Return reports of recipes with these means: a common effect of each sequence, one of each seed, and one of both."""
    weights = poisson_weights(int(generator.integers(2**31)), range(n_sequences), KEPT).double().numpy().T
    common, reports = {name: generator.normal(0, 1, n_sequences) for name in METRICS}, {}
    for i, mean in enumerate(means):
        for seed in range(n_seeds):
            metrics, kept = {}, {}
            for name in METRICS:
                x = mean + generator.normal(0, spread) + common[name] + generator.normal(0, 0.3, n_sequences)
                replicates = weights @ x / weights.sum(1)
                metrics[name], kept[name] = Metric(x.mean(), math.nan, math.nan), (replicates - x.mean()).astype(np.float32)
            recipe = Recipe("topk", {}, f"{i}", seed)
            reports[f"{i} {seed}"] = Simulated(metrics, Replicates("w", kept), recipe, n_sequences)
    return reports


def alarms(n: int, means: list[float], n_seeds: int, **settings) -> float:
    """Return the share of tables in which the last recipe differs from the first."""
    generator = np.random.default_rng(0)
    count = 0
    for _ in range(n):
        floors = noise_floors(drawn(generator, means, n_seeds, **settings), metrics=METRICS)
        count += bool(floors.differing(list(floors.recipes)[-1]))
    return count / n


def test_equal_recipes_seldom_differ_and_a_planted_difference_is_seen():
    """The spread over seeds exceeds the noise of the text; 5 % of 250 tables are 12.5 ± 3.4."""
    settings = {"n_sequences": 50, "spread": 0.1}
    assert alarms(250, [0.0, 0.0], 3, **settings) <= 0.06
    assert alarms(60, [0.0, 0.6], 3, **settings) > 0.9
    assert alarms(60, [0.0, 0.05], 3, **settings) < 0.2


def test_equal_dictionaries_of_one_seed_seldom_differ_by_the_text():
    settings = {"n_sequences": 25, "spread": 0.0}
    share = alarms(400, [0.0, 0.0], 1, **settings)
    assert 0.015 <= share <= 0.075
    assert alarms(100, [0.0, 0.4], 1, **settings) > 0.9  # 4.7 deviations of the paired difference, 1.4 of an unpaired one


def test_a_recipe_with_one_seed_borrows_the_spread_of_others():
    generator = np.random.default_rng(3)
    reports = drawn(generator, [0.0, 0.0, 0.0], 4, n_sequences=200, spread=0.2)
    some = {name: reports[name] for name in ("0 0", "1 0", "2 0", "2 1", "2 2", "2 3")}
    floors = noise_floors(some, metrics=METRICS)
    assert list(map(len, floors.recipes.values())) == [1, 1, 4]
    assert "recipes with one seed borrow it" in floors.caption
    alone = noise_floors({name: reports[name] for name in ("0 0", "1 0")}, metrics=METRICS)
    assert "differences between seeds are not included" in alone.caption
    assert floors.floors["fvu"] > 5 * alone.floors["fvu"]
    values = [reports[f"2 {i}"].metrics["fvu"].value for i in range(4)]
    assert floors.floors["fvu"] > stats.t.ppf(0.975, 3) * 2**0.5 * np.std(values, ddof=1)  # between two single seeds


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(600, 24, generator=generator).relu() @ torch.randn(24, 16, generator=generator)


def fitted(x: torch.Tensor, seed: int, **settings) -> sl.Dictionary:
    return sl.fit(x, **{"d_sae": 64, "k": 4, "n_tokens": 4000, "batch_size": 200, "lr": 5e-3, "seed": seed} | settings)


@pytest.fixture(scope="module")
def recipes(x) -> dict[str, sl.Dictionary]:
    named = {f"runs/{name}-s{seed}": fitted(x, seed, **more) for name, more in (("a", {}), ("b", {"k": 8})) for seed in (0, 1)}
    return named | {"runs/c": fitted(x, 0, lr=1e-3)}


@pytest.fixture(scope="module")
def reports(x, recipes) -> dict[str, EvalReport]:
    return dict(zip(recipes, sl.evaluate(list(recipes.values()), x, n_bootstrap=300), strict=True))


def test_the_floor_of_two_reports_is_that_of_a_reference_in_float64(x, recipes, reports):
    names = ["runs/a-s0", "runs/c"]
    weights = poisson_weights(mixed_seed("bootstrap", 0), range(len(x)), KEPT).double().T
    weights = torch.cat([torch.ones(1, len(x)).double(), weights])
    total = (weights @ x.double().square()).sum(1) - (weights @ x.double()).square().sum(1) / weights.sum(1)
    with torch.no_grad():
        errors = [(x - recipes[name](x)).double().square().sum(1) for name in names]
    difference = weights @ (errors[0] - errors[1]) / total
    n = len(x)
    deviation = float(difference[1:].std()) * (n / (n - 1)) ** 0.5
    df = 1 / (1 / (n - 1) + 1 / (KEPT - 1))
    floors = noise_floors({name: reports[name] for name in names}, metrics=["fvu"])
    assert floors.floors["fvu"] == pytest.approx(deviation * stats.t.ppf(0.975, df), rel=2e-3)
    assert floors.differ("fvu", *names) == (abs(float(difference[0])) > floors.floors["fvu"])


def test_reports_from_files_have_the_same_floors(reports, tmp_path):
    again = {}
    for i, (name, report) in enumerate(reports.items()):
        report.to_json(tmp_path / f"{i}.json")
        again[name] = EvalReport.from_json(tmp_path / f"{i}.json")
        assert again[name].recipe == report.recipe
    assert noise_floors(again) == noise_floors(reports)
    earlier = {name: EvalReport.from_dict({k: v for k, v in r.to_dict().items() if k not in ("recipe", "replicates")})
               for name, r in reports.items()}  # fmt: skip
    floors = noise_floors(earlier)
    assert "unpaired" in floors.caption
    assert floors.floors["fvu"] > noise_floors(reports, {name: [name] for name in reports}).floors["fvu"]
    content = next(iter(reports.values())).to_dict()
    for bad in ({"replicates": {"weights": 3, "differences": {}}}, {"replicates": {"weights": "", "differences": {"fvu": "?"}}},
                {"recipe": {"rule": "topk"}}, {"recipe": [1]}):  # fmt: skip
        with pytest.raises(CorruptFileError):
            EvalReport.from_dict(content | bad)


def firings(generator: np.random.Generator, rates: np.ndarray, n_sequences: int, names: str) -> tuple[PooledSums, dict]:
    """Return the pooled counts of independent latents that fire at these rates per text, and those of each sequence."""
    sums = PooledSums(100, int(generator.integers(2**31)), n_sequences)
    counts = {name: generator.poisson(rates / n_sequences, (n_sequences, len(rates))) for name in names}
    for number in torch.arange(n_sequences).split(17):
        sums.weigh(number)
        sums.add("n", torch.full((len(number),), 10.0))
        for name, of_text in counts.items():
            here = torch.from_numpy(of_text)[number]
            sequence, latent = here.nonzero(as_tuple=True)
            times = here[sequence, latent]
            sums.add_fired(name, sequence.repeat_interleave(times), latent.repeat_interleave(times), len(rates))
    sums.pool()
    return sums, counts


def alive_report(sums: PooledSums, name: str) -> ComparedScores:
    step = 1 / len(sums.fired(name))
    kept = Replicates.of_values("w", {"frac_alive": alive_values(sums, name)}, {"frac_alive": step})
    return ComparedScores({"frac_alive": latent_metrics(sums, name)["frac_alive"]}, kept, None, sums.n_units)


RATES = {
    "Zipf": 500 * np.arange(1, 201.0) ** -1.2,
    "many rare latents": np.where(np.arange(200) < 100, 15.0, 0.1),
    "trained, few dead": np.where(np.arange(200) < 180, 15.0, 1.5),
}


def test_replicates_of_the_share_alive_are_those_of_a_jackknife_over_sequences():
    sums, counts = firings(np.random.default_rng(0), RATES["Zipf"], 40, "a")
    fires = counts["a"] > 0
    lost = np.array([fires.any(0).sum() - np.delete(fires, i, 0).any(0).sum() for i in range(40)])
    assert lost.sum() > 10
    weights = poisson_weights(sums._seed, range(40), 100).double().numpy().T
    wanted = fires.any(0).sum() + (weights - 1) @ (lost - lost.mean())
    values = alive_values(sums, "a").numpy() * 200
    assert values[0] == fires.any(0).sum()
    np.testing.assert_allclose(values[1:], wanted, atol=1e-9)


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_the_share_alive_varies_as_over_texts(rates):
    """The number of independent latents that fire has the variance Σ p (1 − p); dictionaries of equal rates seldom differ."""
    generator, n_tables = np.random.default_rng(0), 100
    dead = np.exp(-rates)
    deviation = float((dead * (1 - dead)).sum() ** 0.5) / len(rates)
    floors, n_alarms, n_covered = [], 0, 0
    for _ in range(n_tables):
        sums, _ = firings(generator, rates, 50, "ab")
        reports = {name: alive_report(sums, name) for name in "ab"}
        compared = noise_floors(reports, metrics=["frac_alive"])
        floors.append(compared.floors["frac_alive"])
        n_alarms += compared.differ("frac_alive", "a", "b")
        m = reports["a"].metrics["frac_alive"]
        n_covered += m.low <= 1 - dead.mean() <= m.high
    assert n_alarms / n_tables <= 0.06
    assert n_covered / n_tables >= 0.93
    assert 0.95 <= np.mean(floors) / (2**0.5 * 1.96 * deviation) <= 1.6


def test_few_replicates_give_no_floor_and_the_note_says_what_to_do(x, recipes):
    pair = [recipes["runs/a-s0"], recipes["runs/c"]]
    few = noise_floors(dict(zip("ac", sl.evaluate(pair, x, n_bootstrap=9), strict=True)))
    assert all(map(math.isnan, few.floors.values()))
    assert not few.differing("c")
    assert few.caption.startswith("No noise floor: it needs at least 10 bootstrap replicates; raise n_bootstrap.")
    enough = noise_floors(dict(zip("ac", sl.evaluate(pair, x, n_bootstrap=10), strict=True)))
    assert math.isfinite(enough.floors["fvu"])


def test_an_interval_that_ends_at_a_bound_has_the_deviation_of_its_longer_side():
    def floor(high: float) -> float:
        pair = {name: ComparedScores({"frac_alive": Metric(0.999, 0.995, high)}, None, None, 200) for name in "ab"}
        return noise_floors(pair, metrics=["frac_alive"]).floors["frac_alive"]

    assert floor(1.0) == floor(1.003) == pytest.approx(2**0.5 * 0.004 * stats.t.ppf(0.975, 199) / 1.96, rel=5e-3)


def test_seeds_are_known_by_the_tokens_they_were_to_see_and_not_by_those_of_the_last_batch(recipes):
    def of(**changed) -> Recipe:
        d = copy.deepcopy(recipes["runs/a-s0"])
        d.training_record |= changed
        return recipe_of(d)

    whole = of()
    assert of(tokens=4000, steps=21, kl_after=2800).sha256 == of(tokens=4199, steps=22, kl_after=2811).sha256 == whole.sha256
    for other in (
        {"tokens": 2000, "steps": 10},
        {"tokens": 3999},
        {"tokens": 4200},
        {"extended_after": 1000},
        {"stopped": "NaN"},
    ):
        assert of(**other).sha256 != whole.sha256
    assert of(tokens=2000, steps=10).sha256 != of(tokens=2200, steps=11).sha256


def test_another_bootstrap_seed_is_not_paired(x, recipes, reports):
    other = sl.evaluate(recipes["runs/c"], x, n_bootstrap=300, seed=1)
    pair = {"a": reports["runs/a-s0"], "c": other}
    floors = noise_floors(pair)
    assert "different texts or bootstrap seeds" in floors.caption
    assert floors.floors["fvu"] > noise_floors(pair | {"c": reports["runs/c"]}).floors["fvu"]


def test_seeds_of_one_recipe_are_recognised(x, recipes, reports):
    floors = noise_floors(reports)
    assert floors.recipes == {"runs/a": ("runs/a-s0", "runs/a-s1"), "runs/b": ("runs/b-s0", "runs/b-s1"), "runs/c": ("runs/c",)}
    assert floors.differ("l0", "runs/a", "runs/b")
    assert floors.values["runs/a"]["fvu"].value == pytest.approx(
        (reports["runs/a-s0"]["fvu"] + reports["runs/a-s1"]["fvu"]) / 2
    )
    mapped = noise_floors(reports, {"first": ["runs/a-s0", "runs/a-s1"], "second": ["runs/b-s1"]})
    assert list(mapped.recipes) == ["first", "runs/b-s0", "second", "runs/c"]
    assert recipe_of(sl.Dictionary.create("topk", reads=4, d_sae=8, options={"k": 2})) is None
    frame = floors.columns()
    assert frame["n_seeds"][frame["recipe"].index("runs/b")] == 2


def test_repeating_a_report_does_not_make_seeds(reports):
    twice = {"one": reports["runs/a-s0"], "two": reports["runs/a-s0"], "other": reports["runs/c"]}
    assert not noise_floors(twice).has_seeds


def test_dictionaries_of_different_data_settings_or_texts_are_no_seeds(x, recipes, reports):
    first = {name: reports[name] for name in ("runs/a-s0", "runs/a-s1")}
    d = recipes["runs/a-s1"]
    elsewhere = fitted(x.flip(1), 1)
    assert elsewhere.training_record["config"] == d.training_record["config"]
    wider = copy.deepcopy(d)
    wider.rule = type(d.rule)(d.rule.config.replace(k=5), d_in=16, d_sae=64)
    damaged = permuted_dictionary(d, None, 0)
    others = dict(zip("ewp", sl.evaluate([elsewhere, wider, damaged], x, n_bootstrap=300), strict=True))
    assert noise_floors(first | others).recipes == {"runs/a": tuple(first), "e": ("e",), "w": ("w",), "p": ("p",)}
    assert others["p"].recipe is None
    assert str(others["w"].recipe) == "topk k=5"
    unknown = fitted(x, 0)
    del unknown.training_record["data_sha256"]
    assert recipe_of(unknown) is None

    halves = {name: sl.evaluate(d, part, n_bootstrap=300) for name, part in (("one", x[:300]), ("two", x[300:]))}
    assert halves["one"].recipe == halves["two"].recipe
    assert noise_floors(halves | {"k": others["w"]}).recipes == {name: (name,) for name in ("one", "two", "k")}
    other_seed = {"s0": sl.evaluate(recipes["runs/a-s0"], x[:300], n_bootstrap=300), "s1": halves["two"]}
    assert not noise_floors(other_seed).has_seeds  # distinct seeds, but each on a text of its own
    edited = copy.deepcopy(d)
    edited.W_dec.data.mul_(0.9)
    pair = {"whole": reports["runs/a-s1"], "edited": sl.evaluate(edited, x, n_bootstrap=300)}
    assert not noise_floors(pair).has_seeds


def test_a_recipe_never_takes_the_name_of_another_report(reports):
    names = {"t-1": "runs/a-s0", "t-2": "runs/a-s1", "t": "runs/c"}
    for order in (["t-1", "t-2", "t"], ["t", "t-1", "t-2"]):
        floors = noise_floors({name: reports[names[name]] for name in order})
        assert sorted(floors.recipes.values()) == [("t",), ("t-1", "t-2")]
        assert floors.recipes["t"] == ("t",)


def test_notes_say_what_the_floor_of_each_metric_is_from(reports):
    pair = {name: reports[name] for name in ("runs/a-s0", "runs/c")}
    assert noise_floors(pair, metrics=["mse"]).notes[0] == (
        "From the intervals, unpaired: the reports hold no replicates of it."
    )
    both = noise_floors(pair, metrics=["fvu", "mse"])
    assert both.notes[:2] == (
        "fvu: Paired bootstrap over 600 rows.",
        "mse: From the intervals, unpaired: the reports hold no replicates of it.",
    )


def test_unknown_metrics_and_rows_are_refused(reports):
    with pytest.raises(ConfigError, match="no report has the metric 'fuv'; did you mean fvu"):
        noise_floors(reports, metrics=["fvu", "fuv"])
    with pytest.raises(ConfigError, match=r"expected a list of names, such as \['fvu'\]"):
        noise_floors(reports, metrics="fvu")
    floors = noise_floors(reports)
    with pytest.raises(ConfigError, match="no row 'runs/A'; the rows are runs/a"):
        floors.differ("fvu", "runs/A", "runs/b")
    with pytest.raises(ConfigError, match="no report has the metric 'fvo'"):
        floors.differ("fvo", "runs/a", "runs/b")
    assert not floors.differ("ce_loss_score", "runs/a", "runs/b")
    poorer = {k: m for k, m in reports["runs/c"].metrics.items() if k != "fvu"}
    three = noise_floors(
        {"a": reports["runs/a-s0"], "b": reports["runs/b-s0"], "c": replace(reports["runs/c"], metrics=poorer)}
    )
    assert not three.differ("fvu", "a", "b")
    assert three.differ("l0", "a", "b")


def test_arguments_of_other_kinds_are_refused(reports):
    """Types are not checked when users call it, unlike in tests."""
    unchecked = inspect.unwrap(noise_floors)
    for given in ({}, list(reports.values()), {"a": 3}):
        with pytest.raises(ConfigError, match="compares reports by name"):
            unchecked(given)
    for level in ("x", True, None):
        with pytest.raises(ConfigError, match="expected a share between 0 and 1"):
            unchecked(reports, level=level)
    for seeds in (["runs/c"], {"a": 3}, {"a": [3]}):
        with pytest.raises(ConfigError, match="seeds"):
            unchecked(reports, seeds)
    with pytest.raises(ConfigError, match="calls a recipe 'runs/c', but a report of that name"):
        noise_floors(reports, {"runs/c": ["runs/a-s0", "runs/a-s1"]})
    with pytest.raises(ConfigError, match="dictionaries by name"):
        inspect.unwrap(further_controls)({1: sl.Dictionary.create("topk", reads=8, d_sae=16, options={"k": 2})})


def test_wrong_groups_are_refused(reports):
    with pytest.raises(ConfigError, match="names 'runs/a-s7', which is no report; did you mean"):
        noise_floors(reports, {"a": ["runs/a-s7"]})
    with pytest.raises(ConfigError, match="twice; a report belongs to one recipe"):
        noise_floors(reports, {"a": ["runs/c"], "b": ["runs/c"]})
    with pytest.raises(ConfigError, match="expected a list of names"):
        noise_floors(reports, {"a": "runs/c"})
    with pytest.raises(ConfigError, match="level = 5"):
        noise_floors(reports, level=5.0)


def test_tables_state_the_floor_and_mark_what_exceeds_it(reports, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    single = {name: reports[name] for name in ("runs/a-s0", "runs/b-s0", "runs/c")}
    text = as_text(table(single))
    assert max(map(len, text.splitlines())) <= 80
    line = {row.split()[0]: row for row in text.splitlines() if row.strip()}
    assert "≠" not in line["a-s0"]
    assert line["b-s0"].split()[1:4] == ["8.00", "±0≠", f"{reports['runs/b-s0'].metrics['fvu'].short.split()[0]}"]
    assert "noise floor" in text
    assert "One seed each: differences between seeds are not included" in " ".join(text.split())
    grouped = " ".join(as_text(table(reports)).split())
    assert "a, 2 seeds" in grouped
    assert "c, 1 seed" in grouped
    assert "pooled over recipes (2 degrees of freedom)" in grouped
    one = as_text(table({"a": reports["runs/a-s0"]}))
    assert "noise floor" not in one


def test_permuted_rows_are_a_tenth_of_the_live_ones_and_none_stays():
    d = sl.Dictionary.create("topk", reads=8, d_sae=100, options={"k": 4}, seed=1)
    density = torch.linspace(0, 1, 100)
    density[:40] = 0
    damaged = permuted_dictionary(d, density, seed=5)
    moved = (damaged.W_dec != d.W_dec).any(1).nonzero().squeeze(1)
    assert len(moved) == 6
    assert int(moved.min()) >= 40
    rows = [tuple(row.tolist()) for row in d.W_dec[moved]]
    assert sorted(tuple(row.tolist()) for row in damaged.W_dec[moved]) == sorted(rows)
    assert torch.equal(damaged.W_enc, d.W_enc)
    assert torch.equal(permuted_dictionary(d, density, seed=5).W_dec, damaged.W_dec)
    assert len((permuted_dictionary(d, None, 0).W_dec != d.W_dec).any(1).nonzero()) == 10


def test_permuted_rows_damage_a_rule_that_encodes_with_its_decoder(x):
    d = fitted(x, 0, sparsity="matching_pursuit")
    report = sl.evaluate(d, x, n_bootstrap=100, controls=True)
    damaged = permuted_dictionary(d, report.density, 0)
    with torch.no_grad():
        codes, theirs = d.encode(x), damaged.encode(x)
        assert torch.equal(codes.latent, theirs.latent)
        assert torch.equal(codes.value, theirs.value)
        wanted = codes.to_dense() @ damaged.W_dec + d.b_dec
        torch.testing.assert_close(damaged(x), wanted)
        error = float((x - wanted).square().sum() / (x - x.mean(0)).square().sum())
    assert report.controls[PERMUTED]["fvu"] == pytest.approx(error, rel=1e-4)
    assert report.controls[PERMUTED]["fvu"] > 1.2 * report["fvu"]
    assert report.not_told[PERMUTED] == ("l0", "frac_alive")


def test_a_metric_that_cannot_tell_a_damaged_decoder_is_marked(x, recipes):
    d = recipes["runs/a-s0"]
    oracle = sl.Dictionary.create("l1", reads=16, d_sae=32, seed=0)
    eye = torch.eye(16)
    oracle.W_enc.data.copy_(torch.cat([eye, -eye], 1))
    oracle.W_dec.data.copy_(torch.cat([eye, -eye]))
    report = sl.evaluate(d, x, n_bootstrap=100, controls={"oracle": oracle})
    assert list(report.controls) == ["random", "PCA", PERMUTED, "oracle"]
    assert report.controls[PERMUTED]["fvu"] > report["fvu"]
    assert report.not_told[PERMUTED] == ("l0", "frac_alive")  # the encoder is the same
    assert "fvu" not in report.not_told["oracle"]
    assert report.controls["oracle"]["fvu"] == pytest.approx(0, abs=1e-9)
    again = EvalReport.from_dict(json.loads(report.to_json()))
    assert again.not_told == report.not_told
    row = next(line for line in str(report).splitlines() if PERMUTED in line)
    assert row.count("≈") == 2
    assert "≈: cannot tell the control from its dictionary" in report.to_markdown()
    same = sl.Dictionary.create("topk", reads=16, d_sae=32, options={"k": 2}, seed=0)
    same.W_dec.data.copy_(same.W_dec.data[:1].expand(32, -1))  # rows that are all alike can be permuted freely
    assert "fvu" in sl.evaluate(same, x, n_bootstrap=100, controls=True).not_told[PERMUTED]


def test_controls_that_are_refused(x, recipes):
    d = recipes["runs/a-s0"]
    with pytest.raises(ConfigError, match="has the name 'PCA'"):
        sl.evaluate(d, x, controls={"PCA": d})
    with pytest.raises(ShapeError, match=r"takes \[n, 8\]"):
        sl.evaluate(d, x, controls={"oracle": sl.Dictionary.create("topk", reads=8, d_sae=16, options={"k": 2})})


def probes(accuracy: dict[str, tuple[float, float]], n_test: int = 100) -> ProbeReport:
    """Return a report of probes with these accuracies, each with the deviation of its replicates from a common draw."""
    common, generator = np.random.default_rng(0).normal(0, 0.1, KEPT), np.random.default_rng(1)
    made, kept = {}, {}
    for name, (value, own) in accuracy.items():
        noise = (common + generator.normal(0, own, KEPT)).astype(np.float32)
        metric = Metric(value, value - 0.2, value + 0.2)
        made[name] = Probe(metric, metric, metric, metric, 1.0, None)
        kept[name] = Replicates("w", {"accuracy": noise, "auc": noise})
    facts = {"classes": ("a", "b"), "majority": 0.5, "n_train": 30, "n_test": n_test, "pooling": "mean", "text_sha256": "0",
             "model": "m", "hook": "h", "seed": 0}  # fmt: skip
    return ProbeReport(made, **facts, replicates=kept)


def test_probes_are_compared_with_that_on_activations_by_paired_replicates():
    report = probes({"k = 1": (0.7, 0.01), "all latents": (0.8, 0.01), "activations": (0.81, 0.01)})
    floors = report.floors
    assert floors.floors["accuracy"] == pytest.approx(0.01 * 2**0.5 * 2.6, rel=0.3)  # the common 0.1 has no effect
    assert floors.floors["accuracy"] == floors.floors["auc"]
    assert report.columns()["accuracy_differs"] == [True, False, False]
    assert report.to_dict()["noise_floors"]["accuracy"] == floors.floors["accuracy"]
    lines = as_text(probe_table({"": report})).splitlines()
    marked = {line.split("0.")[0].strip(): "≠" in line for line in lines if "±" in line}
    assert marked["k = 1"]
    assert not marked["all latents"]
    assert any(line.strip().startswith("noise floor") for line in lines)
    assert "≠: differs from activations" in " ".join(as_text(probe_table({"": report})).split())
    both = as_text(probe_table({"one": report, "two": report}))
    assert both.count("noise floor  ") == 1  # of one text, so one family


def test_comparisons_with_other_dictionaries_state_the_floor_over_latents(recipes):
    names = list(recipes)
    compared = dict(zip(names[1:], compare_all(recipes[names[0]], [recipes[name] for name in names[1:]]), strict=True))
    pair = {name: compared[name] for name in ("runs/a-s1", "runs/c")}
    text = " ".join(as_text(comparison_table(pair)).split())
    assert "noise floor" in text
    assert "bootstrap over latents, as if they were independent" in text
    shares = [one.shares() for one in pair.values()]
    masks = torch.stack([one.shared[one.live] for one in pair.values()]).double()
    difference = masks[0] - masks[1]
    deviation = float(difference.std(correction=0)) / len(difference) ** 0.5
    sampled = shares[0].replicates.of["shared"] - shares[1].replicates.of["shared"]
    assert float(np.std(sampled)) == pytest.approx(deviation, rel=0.2, abs=1e-6)
    assert shared_floors(compared).recipes["runs/b"] == ("runs/b-s0", "runs/b-s1")
    assert "pooled over recipes (1 degree of freedom)" in " ".join(as_text(comparison_table(compared)).split())
    assert "No noise floor: that needs several dictionaries" in " ".join(as_text(compared["runs/c"].table()).split())
