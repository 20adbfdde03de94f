"""A diff of two models against dense float64 references, planted truth, and the refusals."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import saelens_lite as sl
from saelens_lite.cache.source import TensorSource
from saelens_lite.codes import SparseCodes
from saelens_lite.diffing import controls as diff_controls
from saelens_lite.diffing import reads as diff_reads
from saelens_lite.diffing.controls import with_planted_change
from saelens_lite.diffing.reads import of_source
from saelens_lite.diffing.report import CROSSCODER, DIFFERENCE
from saelens_lite.diffing.sides import Sides
from saelens_lite.diffing.sums import PairSums, quantile_975
from saelens_lite.errors import ConfigError, CorruptFileError, HookError, NonFiniteError, ShapeError
from saelens_lite.model.passes import activations

N, D, D_SAE = 1500, 6, 40
HOOK = "blocks.1.hook_resid_pre"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dictionary_of(keys, d_sae=D_SAE, width=D, seed=0, k=5):
    """Return a dictionary of random weights, without symmetry between ports, encoder and decoder."""
    random = generator(seed)
    reads = [sl.Port.of(key, width) for key in keys]
    d = sl.Dictionary.create("topk", reads=reads, d_sae=d_sae, options={"k": k})
    for name, x in d.named_parameters():
        x.data.copy_(torch.randn(x.shape, generator=random) * (0.3 if name.startswith("b") else 1))
    return d


def random_acts(keys, n=N, width=D, seed=1):
    random = generator(seed)
    return {key: 3 * (i + 1) * torch.randn(n, width, generator=random) + i for i, key in enumerate(keys)}


def dense_reference(d, acts, hooks):
    """Return the numbers of a crosscoder of base and chat from dense float64 matrices, by their definitions."""
    keys = [f"{m}:{hook}" for m in ("base", "chat") for hook in hooks]
    twin = sl.Dictionary.create("topk", reads=d.reads, d_sae=d.d_sae, options={"k": d.rule.config.k}).double()
    twin.load_state_dict(d.state_dict())
    ports = [port.key for port in d.reads]
    x = torch.cat([acts[key] for key in ports], 1).double()
    f = d.encode(x.float()).to_dense().detach().double()
    x_hat, b = f @ twin.W_dec + twin.b_dec, twin.b_dec
    scale = {key: math.sqrt(D) / float(acts[key].double().square().sum(1).mean().sqrt()) for key in keys}

    def of(model, rows, inverse=False):
        parts = dict(zip(ports, rows.split(D, -1), strict=True))
        names = [f"{model}:{hook}" for hook in hooks]
        return torch.cat([parts[key] * (1 / scale[key] if inverse else scale[key]) for key in names], -1).detach()

    W = {m: of(m, twin.W_dec) for m in ("base", "chat")}
    E = {m: of(m, twin.W_enc.T, inverse=True) for m in ("base", "chat")}
    norm = {m: W[m].norm(dim=1) for m in W}

    def beta(part, m, direction, j):
        own = torch.outer(f[:, j], W[m][j])
        Y = of(m, x) - of(m, x_hat) + own if part == "error" else of(m, x_hat) - of(m, b)
        return float(W[direction][j] @ (Y.T @ f[:, j]) / (norm[direction][j] ** 2 * f[:, j].square().sum()))

    out = {
        "frequency": (f != 0).double().mean(0),
        "norm_base": norm["base"],
        "norm_tuned": norm["chat"],
        "delta_norm": 0.5 * ((norm["base"] - norm["chat"]) / torch.maximum(norm["base"], norm["chat"]) + 1),
        "cosine": F.cosine_similarity(W["base"], W["chat"]),
        "encoder_cosine": F.cosine_similarity(E["base"], E["chat"]),
    }
    for part in ("error", "reconstruction"):
        betas = {
            (m, of_): torch.tensor([beta(part, m, of_, j) for j in range(d.d_sae)], dtype=torch.float64) for m in W for of_ in W
        }
        out[f"beta_{part}_base"], out[f"beta_{part}_tuned"] = betas["base", "chat"], betas["chat", "chat"]
        out[f"nu_{part}"] = betas["base", "chat"] / betas["chat", "chat"]
        out[f"mirror_{part}"] = betas["chat", "base"] / betas["base", "base"]
    return out


@pytest.mark.parametrize("hooks", [["h"], ["h1", "h2"]], ids=["one hook", "two hooks"])
def test_numbers_are_those_of_dense_float64_products(hooks):
    keys = [f"{m}:{hook}" for hook in hooks for m in ("base", "chat")]
    d, acts = dictionary_of(keys), random_acts(keys)
    report, wanted = sl.diff(d, acts), dense_reference(d, acts, hooks)
    assert tuple(report.values) == CROSSCODER
    assert (report.base, report.tuned, report.n_tokens, report.d_sae) == ("base", "chat", N, D_SAE)
    assert (report.units, report.n_units) == ("blocks of 23 consecutive activations", 66)
    for name, x in wanted.items():
        assert torch.allclose(report[name].double(), x, rtol=1e-4, atol=1e-5), name


def test_numbers_of_differences_are_those_of_dense_float64_products():
    d, acts = dictionary_of(["chat-base:h"]), random_acts(["base:h", "chat:h"])
    report = sl.diff(d, acts)
    assert tuple(report.values) == DIFFERENCE
    x = {m: acts[f"{m}:h"].double() for m in ("base", "chat")}
    f = d.encode(acts["chat:h"] - acts["base:h"]).to_dense().detach().double()
    W = d.W_dec.detach().double()
    beta = {m: (((x[m] - x[m].mean(0)).T @ f).T * W).sum(1) / (W.square().sum(1) * f.square().sum(0)) for m in x}
    wanted = {
        "beta_activation_base": beta["base"],
        "beta_activation_tuned": beta["chat"],
        "nu_activation": beta["base"] / beta["chat"],
        "mirror_activation": beta["chat"] / beta["base"],
        "norm": W.norm(dim=1),
    }
    for name, value in wanted.items():
        assert torch.allclose(report[name].double(), value, rtol=1e-3, atol=1e-5, equal_nan=True), name


def test_a_port_with_larger_activations_changes_nothing():
    """The base model's activations times ten, with the same dictionary in the new units."""
    keys = ["base:h", "chat:h"]
    d, acts = dictionary_of(keys), random_acts(keys)
    larger = dictionary_of(keys)
    with torch.no_grad():
        larger.W_enc[:D] /= 10
        larger.W_dec[:, :D] *= 10
        larger.b_dec[:D] *= 10
    one, other = sl.diff(d, acts), sl.diff(larger, acts | {"base:h": acts["base:h"] * 10})
    for name in CROSSCODER:
        assert torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4, equal_nan=True), name
    raw = larger.W_dec.detach()
    assert float((raw[:, :D].norm(dim=1) / raw[:, D:].norm(dim=1)).median()) > 5  # raw norms would call all of them base only
    assert other.classes("norm") == one.classes("norm")


def test_base_is_the_first_model_or_the_one_that_is_named():
    keys = ["base:h", "chat:h"]
    d, acts = dictionary_of(keys), random_acts(keys)
    one, other = sl.diff(d, acts), sl.diff(d, acts, base="chat")
    assert (other.base, other.tuned) == ("chat", "base")
    assert torch.allclose(one["delta_norm"], 1 - other["delta_norm"], atol=1e-6)
    assert torch.allclose(one["nu_error_high"], other["mirror_error_high"], equal_nan=True)
    assert one.kinds[:2] == ("chat only", "base only")


def test_batches_change_no_number():
    keys = ["base:h", "chat:h"]
    d, acts = dictionary_of(keys), random_acts(keys)
    one, other = sl.diff(d, acts), sl.diff(d, acts, batch_tokens=30)
    for name in CROSSCODER:
        assert torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5, equal_nan=True), name


def test_pieces_are_joined_into_whole_blocks():
    pieces = [{"x": torch.arange(a, b)} for a, b in ((0, 5), (5, 6), (6, 14), (14, 17))]
    got = [piece["x"].tolist() for piece in diff_reads._whole_blocks(iter(pieces), ["x"], 4)]
    assert [len(x) % 4 for x in got[:-1]] == [0] * (len(got) - 1)
    assert [i for some in got for i in some] == list(range(17))


def planted(n=12_000, shared=24, own=6, width=24, seed=3):
    """Return activations of two models that share directions and have some of their own, and the directions."""
    random = generator(seed)
    directions = F.normalize(torch.randn(shared + 2 * own, width, generator=random), dim=1)
    active = torch.rand(n, shared + 2 * own, generator=random) < 0.06
    codes = active * (0.5 + torch.rand(n, shared + 2 * own, generator=random))
    base, chat = codes.clone(), codes.clone()
    base[:, shared + own :] = 0
    chat[:, shared : shared + own] = 0
    truth = ["shared"] * shared + ["base only"] * own + ["chat only"] * own
    return {"base:h": base @ directions, "chat:h": chat @ directions}, directions, truth


@pytest.fixture(scope="module")
def trained():
    acts, directions, truth = planted()
    config = sl.TrainConfig(
        reads=("base:h", "chat:h"), sparsity="batch_topk", options={"k": 2}, d_sae=48, n_tokens=90_000, batch_size=512,
        dead_after=10_000, lr=0.01,
    )  # fmt: skip
    (run,) = sl.train(TensorSource(acts), config)
    return run.dictionary, acts, directions, truth


@pytest.mark.parametrize("by", ["nu", "norm"])
def test_planted_latents_get_their_class(trained, by):
    d, acts, directions, truth = trained
    classes = sl.diff(d, acts).classes(by)
    right = {"chat only": 0, "base only": 0}
    for latent, name in enumerate(classes):
        if name in right:
            half = d.W_dec.detach()[latent].split(24)[1 if name == "chat only" else 0]
            nearest = int((directions @ F.normalize(half, dim=0)).argmax())
            assert truth[nearest] == name
            right[name] += 1
    assert min(right.values()) >= 5
    assert classes.count("shared") >= 20


def test_controls_measure_false_alarms_and_find_the_planted_change(trained, monkeypatch):
    """The change is planted as often as other directions are active, so that a short training learns it."""
    monkeypatch.setattr(diff_controls, "PLANTED", 0.06)
    d, acts, _, _ = trained
    report = sl.diff(
        d,
        acts,
        controls=True,
        train=sl.TrainConfig(**d.training_record["config"]).replace(n_tokens=90_000, d_sae=40, options={"k": 3}),
    )
    twice, changed = report.controls.values()
    assert twice.share_by_nu == 0
    assert twice.planted_by_nu is None
    assert changed.planted_by_nu == "chat only"
    assert changed.cosine > 0.8
    assert changed.share_by_nu < 0.1
    assert "base twice: 0.00% of 40 latents are called specific" in report.summary
    assert "is called chat only" in report.summary


def test_planted_change_is_one_direction_on_one_token_in_a_hundred():
    sides = Sides("base", "chat", ("h",), False)
    x = {"base:h": torch.randn(20_000, 8, generator=generator())}
    acts, direction = with_planted_change(x, sides, seed=1)
    change = acts["chat:h"] - acts["base:h"]
    sizes = change.norm(dim=1)
    assert 0.007 < float((sizes > 0).float().mean()) < 0.013
    assert torch.allclose(F.cosine_similarity(change[sizes > 0], direction[None]), torch.ones(()), atol=1e-4)
    spread = float((x["base:h"] - x["base:h"].mean(0)).square().sum(1).mean().sqrt())
    assert 0.49 * spread < float(sizes[sizes > 0].min()) < float(sizes.max()) < 1.01 * spread


def test_controls_of_differences_plant_a_change():
    acts, _, _ = planted(n=4000)
    difference = acts | {"chat-base:h": acts["chat:h"] - acts["base:h"]}
    config = sl.TrainConfig(
        reads=("chat-base:h",), sparsity="batch_topk", options={"k": 1}, d_sae=24, n_tokens=25_000, batch_size=512, lr=0.01
    )
    (run,) = sl.train(TensorSource(difference), config)
    report = sl.diff(run.dictionary, acts, controls=True)
    (control,) = report.controls.values()
    assert (control.planted_by_nu, control.planted_by_norm, control.share_by_norm) == ("chat only", None, None)
    assert control.cosine > 0.7
    assert "by Δ_norm" not in str(report)
    with pytest.raises(ConfigError, match="difference"):
        report.classes("norm")


def test_intervals_of_ratios_cover_the_truth_in_95_percent():
    """Each latent is a repetition: 15 units with correlated sums, some units with many rows."""
    n_latents, n_units, ratio = 3000, 15, 0.3
    random = np.random.default_rng(0)
    sums = PairSums(n_latents, (("a", "b"),))
    for _ in range(n_units):
        size = random.gamma(2, 1, n_latents)
        b = size * (1 + 0.3 * random.standard_normal(n_latents))
        a = ratio * size * (1 + 0.5 * random.standard_normal(n_latents))
        codes = sl.SparseCodes.from_dense(torch.ones(1, n_latents))
        sums.add(codes, torch.zeros(1, dtype=torch.long), {"a": torch.from_numpy(a), "b": torch.from_numpy(b)})
    got = sums.ratio("a", "b", min_units=10)
    assert not got.low.isnan().any()
    assert ((got.low <= got.value) & (got.value <= got.high)).all()
    assert 0.935 < float(((got.low < ratio) & (ratio < got.high)).float().mean()) < 0.965
    assert sums.ratio("a", "b", min_units=16).low.isnan().all()


def test_a_ratio_with_a_denominator_near_0_has_no_interval():
    sums = PairSums(1, (("a", "b"),))
    for sign in (1, -1) * 8:
        codes = sl.SparseCodes.from_dense(torch.ones(1, 1))
        sums.add(codes, torch.zeros(1, dtype=torch.long), {"a": torch.ones(1), "b": torch.tensor([sign + 0.01])})
    assert sums.ratio("a", "b", min_units=10).high.isnan().all()


def test_quantiles_are_those_of_students_distribution():
    from scipy.stats import t

    freedom = np.array([9, 12, 30, 200, 1e6])
    assert np.allclose(quantile_975(freedom), t.ppf(0.975, freedom), atol=2e-4)


def test_latents_that_fire_in_few_units_are_unknown():
    keys = ["base:h", "chat:h"]
    d, acts = dictionary_of(keys, k=1), random_acts(keys)
    report = sl.diff(d, acts)
    f = d.encode(torch.cat([acts[key] for key in keys], 1)).to_dense()
    in_units = torch.stack([(piece != 0).any(0) for piece in f.split(23)]).sum(0)
    rare = in_units < 10
    assert bool(rare.any())
    assert not bool(rare.all())
    assert report["nu_error_low"][rare].isnan().all()
    classes = report.classes()
    assert {classes[i] for i in rare.nonzero().flatten().tolist()} == {"unknown"}
    assert report.counts()["unknown"] >= int(rare.sum())


def test_report_is_the_same_after_a_round_trip(tmp_path, trained):
    d, acts, _, _ = trained
    report = sl.diff(d, acts)
    report.to_json(tmp_path / "diff.json")
    again = sl.DiffReport.from_json(tmp_path / "diff.json")
    for name, x in report.values.items():
        assert torch.equal(x.nan_to_num(7.0), again[name].nan_to_num(7.0)), name
    assert again.columns()["class"] == report.classes()
    assert str(again) == str(report)
    assert again.only("chat") == report.only("chat")
    said = json.loads((tmp_path / "diff.json").read_text())
    said["values"]["cosine"].pop()
    (tmp_path / "diff.json").write_text(json.dumps(said))
    with pytest.raises(CorruptFileError, match="differ in length"):
        sl.DiffReport.from_json(tmp_path / "diff.json")


def test_only_lists_the_most_specific_latents_first(trained):
    d, acts, _, _ = trained
    report = sl.diff(d, acts)
    delta = report["delta_norm"][report.only("base", by="norm")]
    assert (delta.diff() <= 0).all()
    assert (delta > 0.9).all()
    assert {report.classes()[i] for i in report.only("chat")} == {"chat only"}
    with pytest.raises(ConfigError, match="none of the models, base and chat"):
        report.only("other")
    with pytest.raises(ConfigError, match="it has frequency, norm_base"):
        report["size"]


def test_pictures_have_the_same_bytes(tmp_path, trained):
    d, acts, _, _ = trained
    for one, name in ((sl.diff(d, acts), "a"), (sl.diff(dictionary_of(["chat-base:h"], width=24), acts), "b")):
        first, second = one.plot(tmp_path / f"{name}.svg"), one.plot(tmp_path / f"{name}2.svg")
        assert first.read_bytes() == second.read_bytes()
        assert b"chat only: " in first.read_bytes()
    with pytest.raises(ConfigError, match=r"expected \.png or \.svg"):
        one.plot(tmp_path / "a.pdf")


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (["h"], "two models"),
        (["base:h"], "two models"),
        (["base:h", "chat:h", "other:h"], "two models"),
        (["base:h", "chat-base:h"], "two models"),
        (["base:h1", "chat:h2"], "other hooks"),
    ],
)
def test_dictionaries_of_other_ports_are_refused(keys, why):
    with pytest.raises(ConfigError, match=why):
        sl.diff(dictionary_of(keys), random_acts(keys))


def test_other_widths_in_two_models_are_refused():
    ports = [sl.Port.of("base:h", 4), sl.Port.of("chat:h", 6)]
    d = sl.Dictionary.create("topk", reads=ports, d_sae=8, options={"k": 2})
    with pytest.raises(ConfigError, match="other hooks, or widths, of base than of chat"):
        sl.diff(d, {"base:h": torch.randn(100, 4), "chat:h": torch.randn(100, 6)})


def test_wrong_activations_are_refused(lm):
    keys = ["base:h", "chat:h"]
    d, acts = dictionary_of(keys), random_acts(keys)
    with pytest.raises(HookError, match="not of 'chat:h'"):
        sl.diff(d, {"base:h": acts["base:h"]})
    with pytest.raises(ShapeError, match="have width 7; the dictionary takes 6"):
        sl.diff(d, {key: torch.randn(100, 7) for key in keys})
    with pytest.raises(ConfigError, match="9 blocks of 1 consecutive activations are too few"):
        sl.diff(d, {key: x[:9] for key, x in acts.items()})
    bad = acts["chat:h"].clone()
    bad[77, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="chat:h hold NaN"):
        sl.diff(d, acts | {"chat:h": bad})
    with pytest.raises(NonFiniteError, match="base:h are all zero"):
        sl.diff(d, acts | {"base:h": torch.zeros(N, D)})
    with pytest.raises(ConfigError, match="base = 'other' is none of the dictionary's models, base and chat"):
        sl.diff(d, acts, base="other")
    with pytest.raises(ConfigError, match="together with a text"):
        sl.diff(d, acts, "python-docs")
    with pytest.raises(ConfigError, match="together with a text"):
        sl.diff(d, {"base": lm, "chat": lm})
    with pytest.raises(ConfigError, match="expected models by name"):
        sl.diff(d, lm)
    with pytest.raises(ConfigError, match="does not record the settings of its training"):
        sl.diff(d, acts, controls=True)
    with pytest.raises(ConfigError, match="add controls=True"):
        sl.diff(d, acts, train=sl.TrainConfig())
    with pytest.raises(ConfigError, match="n_tokens = 0"):
        sl.diff(d, acts, n_tokens=0)
    with pytest.raises(ConfigError, match="from which base is subtracted"):
        sl.diff(dictionary_of(["chat-base:h"]), acts, base="chat")


@pytest.fixture(scope="module")
def models(lm):
    """The embedded model twice; the second has other weights in its first block."""
    other = sl.load_model("tiny")
    with torch.no_grad():
        other.blocks[0].mlp.c_proj.weight.mul_(0.5)
    return {"base": lm, "chat": other}


def test_text_is_read_as_in_training(models):
    """The same numbers as with the activations that the passes of a text yield, whose units are rows."""
    keys = [f"base:{HOOK}", f"chat:{HOOK}"]
    d = dictionary_of(keys, width=models["base"].run("a", HOOK)[HOOK].shape[-1], k=8)
    both = sl.Models(models)
    rows = models["base"].to_tokens(torch.randint(5, 4000, (24, 40), generator=generator()))
    report = sl.diff(d, models, rows)
    assert (report.units, report.n_units) == ("rows of tokens", 24)
    got = list(activations(both, rows, keys, 2048))
    acts = {key: torch.cat([one.acts[key] for one in got]) for key in keys}
    wanted = sl.diff(d, acts)
    assert report.n_tokens == wanted.n_tokens == rows.n_kept
    for name in CROSSCODER:
        if not name.endswith(("_low", "_high")):  # the units of arrays are blocks
            assert torch.allclose(report[name], wanted[name], rtol=1e-3, atol=1e-4, equal_nan=True), name
    assert not torch.equal(report["nu_error_low"].nan_to_num(), wanted["nu_error_low"].nan_to_num())


def test_a_cache_is_read_in_its_order(models, tmp_path):
    keys = [f"base:{HOOK}", f"chat:{HOOK}"]
    cache = sl.capture(models, "python-docs", hooks=[HOOK], n_tokens=1500, out=tmp_path / "cache")
    d = dictionary_of(keys, width=cache.d_in(keys[0]), k=8)
    shard = cache.read_shard(0)
    one, other = (
        sl.diff(d, cache),
        sl.diff(d, TensorSource({key: shard[key].float() for key in keys}, origin=cache.origin(keys[0]))),
    )
    assert one.n_tokens == cache.n_tokens
    for name in CROSSCODER:
        assert torch.equal(one[name].nan_to_num(7), other[name].nan_to_num(7)), name
    assert sl.diff(d, cache, n_tokens=1000).n_tokens == 1000


def test_the_command_prints_the_table_and_writes_files(models, tmp_path, monkeypatch, capsys):
    from saelens_lite import cli

    keys = [f"base:{HOOK}", f"chat:{HOOK}"]
    sl.capture(models, "python-docs", hooks=[HOOK], n_tokens=1500, out=tmp_path / "cache")
    d = dictionary_of(keys, width=models["base"].run("a", HOOK)[HOOK].shape[-1], k=8)
    d.save(tmp_path / "d")
    words = f"diff {tmp_path}/d {tmp_path}/cache --json {tmp_path}/diff.json --plot {tmp_path}/diff.svg"
    monkeypatch.setattr("sys.argv", ["saelens-lite", *words.split()])
    cli.main()
    assert "by latent scaling" in " ".join(capsys.readouterr().out.lower().split())
    assert sl.DiffReport.from_json(tmp_path / "diff.json").d_sae == D_SAE
    assert (tmp_path / "diff.svg").exists()


def test_intervals_over_blocks_of_two_rows_hold_where_rows_decide_the_ratio():
    """The ratio varies from row to row, as it does from text to text: shorter blocks would give intervals far too narrow."""
    n_latents, n_ctx, n_rows = 400, 32, 120
    random = torch.Generator().manual_seed(3)
    of_row = 0.3 + 0.3 * torch.randn(n_rows, n_latents, generator=random)
    value = torch.rand(n_rows * n_ctx, n_latents, generator=random) + 0.5
    a, b = (of_row.repeat_interleave(n_ctx, 0) * value).double(), value.double()
    origin = sl.Origin(n_ctx=n_ctx)
    source = TensorSource(
        {key: torch.randn(n_rows * n_ctx, 4, generator=random) for key in ("base:h", "chat:h")}, origin=origin
    )
    covered = {}
    for name, given in (("two rows", source), ("unknown rows", TensorSource(source.x))):
        sums, first = PairSums(n_latents, (("a", "b"),)), 0
        for some in of_source(given, ["base:h"], None):
            part = slice(first, first + len(some.unit))
            here = SparseCodes.from_dense(value[part])
            sums.add(here, some.unit, {"a": a[part][here.row, here.latent], "b": b[part][here.row, here.latent]})
            first = part.stop
        got = sums.ratio("a", "b", min_units=10)
        covered[name] = float(((got.low < 0.3) & (got.high > 0.3)).double().mean())
    assert covered["two rows"] > 0.9


def test_a_skip_connection_is_not_part_of_the_reconstruction_by_latents():
    """Σ f d does not change with W_skip, so neither do β and ν of the reconstruction."""
    random = torch.Generator().manual_seed(5)
    x = {key: torch.randn(3000, 6, generator=random) for key in ("base:in", "base:h", "chat:h")}
    reads, writes = sl.Port.of("base:in", 6), [sl.Port.of("base:h", 6), sl.Port.of("chat:h", 6)]
    d = sl.Dictionary.create("topk", reads=reads, writes=writes, d_sae=10, skip=True, options={"k": 3}, seed=1)
    without = sl.diff(d, x)
    d.W_skip.data.copy_(torch.randn(12, 6, generator=random))
    with_skip = sl.diff(d, x)
    for name in ("beta_reconstruction_base", "beta_reconstruction_tuned", "nu_reconstruction"):
        torch.testing.assert_close(with_skip[name], without[name], equal_nan=True)
    assert not torch.equal(with_skip["beta_error_tuned"], without["beta_error_tuned"])


def test_activations_of_another_model_are_warned_of_and_of_other_processing_refused(caplog):
    from saelens_lite.config import ModelFacts

    def origin(**chat) -> sl.Origin:
        return sl.Origin(models=(ModelFacts(name="base", model="m"), ModelFacts(name="chat", **{"model": "n"} | chat)))

    x = {key: torch.randn(3000, 6, generator=torch.Generator().manual_seed(i)) for i, key in enumerate(("base:h", "chat:h"))}
    ports = [sl.Port.of(key, 6) for key in x]
    d = sl.Dictionary.create("topk", reads=ports, d_sae=10, options={"k": 3}, origin=origin())
    sl.diff(d, TensorSource(x, origin=origin()))
    assert "was trained on" not in caplog.text
    sl.diff(d, TensorSource(x, origin=origin(model="other")))
    assert "chat:h: the dictionary was trained on n, and these activations are of other" in caplog.text
    with pytest.raises(ConfigError, match="capture again with that"):
        sl.diff(d, TensorSource(x, origin=origin(processing=("center_writing_weights",))))
    with pytest.raises(ConfigError, match="load each with"):
        sl.diff(d, {"base": "tiny", "chat": "tiny"}, "python-docs:held-out")
    with pytest.raises(ConfigError, match="batch_tokens is 0"):
        sl.diff(d, x, batch_tokens=0)
