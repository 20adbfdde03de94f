"""Evaluation of dictionaries of several ports and models, against forward passes with hooks of torch in float64."""

import copy
import json
from contextlib import ExitStack
from importlib import import_module

import pytest
import torch

import saelens_lite as sl
from saelens_lite.config import ModelFacts, Origin
from saelens_lite.errors import ConfigError
from saelens_lite.evaluation import table
from saelens_lite.tables import as_text
from saelens_lite.tokens import TokenRows, token_rows

STREAM, MLP = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"
CROSS = (f"base:{STREAM}", f"chat:{STREAM}", f"chat:{MLP}")
TEXTS = ["The old man said that he would not go.", "It was the best of times, it was the worst of times"]
REL = 2e-4


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models(random_lm) -> dict[str, sl.LanguageModel]:
    """A small random model, and the same with other weights in its second block and a scaled embedding."""
    module = copy.deepcopy(random_lm.module)
    for seed, parameter in enumerate(module.transformer.h[1].parameters()):
        parameter.data += 0.1 * normal(*parameter.shape, seed=seed)
    for seed, parameter in enumerate(module.transformer.h[0].mlp.parameters()):
        parameter.data += 0.1 * normal(*parameter.shape, seed=seed)
    return {"base": random_lm, "chat": sl.LanguageModel(module, random_lm.tokenizer, name="chatty")}


@pytest.fixture(scope="module")
def rows(random_lm) -> TokenRows:
    return token_rows(random_lm, TEXTS * 6, n_ctx=12, n_tokens=60)


def dictionary(*keys: str, writes: tuple[str, ...] = (), seed: int = 3) -> sl.Dictionary:
    """Return a dictionary with dense random codes, whose output is not far from the activations."""
    reads = [sl.Port.of(key, 48) for key in keys]
    d = sl.Dictionary.create("l1", reads=reads, writes=[sl.Port.of(key, 48) for key in writes] or None, d_sae=96, seed=seed)
    d.b_dec.data.copy_(0.1 * normal(d.d_out, seed=4))
    return d


class Reference:
    """The models in float64, with hooks of torch at the two places."""

    def __init__(self, models: dict[str, sl.LanguageModel], rows: TokenRows):
        self.modules = {name: copy.deepcopy(lm.module).double() for name, lm in models.items()}
        self.tokens, self.keep = rows.tokens, rows.keep
        ends = torch.arange(rows.tokens.shape[1]) < rows.lengths[:, None] - (0 if rows.ends_text else 1)
        self.predicts = self.keep & ends
        self.predicts[:, -1] = False
        clean = {name: self.run(name, {}) for name in models}
        self.acts = {f"{name}:{hook}": x for name, (_, acts) in clean.items() for hook, x in acts.items()}
        self.acts |= {f"chat-base:{hook}": self.acts[f"chat:{hook}"] - self.acts[f"base:{hook}"] for hook in (STREAM, MLP)}
        self.log_p = {name: logits.log_softmax(-1) for name, (logits, _) in clean.items()}

    def run(self, name: str, new: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the logits and the activations of a model, with activations at some hooks replaced."""
        seen, blocks = {}, self.modules[name].transformer.h

        def put(hook):
            def act(_module, _args, out):
                y = out[0] if isinstance(out, tuple) else out
                seen[hook], y = y, new.get(hook, y)
                return (y, *out[1:]) if isinstance(out, tuple) else y

            return act

        with ExitStack() as stack:
            for hook, module in {STREAM: blocks[0], MLP: blocks[1].mlp}.items():
                stack.callback(module.register_forward_hook(put(hook)).remove)
            return self.modules[name](self.tokens).logits, seen

    def losses(self, name: str, new: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Return the loss and the KL divergence with activations at hooks replaced."""
        log_p = self.run(name, new)[0].log_softmax(-1)
        target = self.tokens.roll(-1, 1)[..., None]
        ce = -log_p.gather(-1, target).squeeze(-1)[self.predicts].mean()
        kl = (self.log_p[name].exp() * (self.log_p[name] - log_p)).sum(-1)[self.keep].mean()
        return float(ce), float(kl)

    def scores(self, name: str, ports: dict[str, dict[str, torch.Tensor]]) -> dict[str, float]:
        """Return the losses and scores of the reconstruction. ports: by hook, its "sae", "zero" and "mean"."""
        ce, kl = {"clean": self.losses(name, {})[0]}, {}
        for kind in ("sae", "zero", "mean"):
            ce[kind], kl[kind] = self.losses(name, {hook: new[kind] for hook, new in ports.items()})
        return {
            "ce_loss_score": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
            "kl_div_score": (kl["zero"] - kl["sae"]) / kl["zero"],
            "kl_div_score_mean": (kl["mean"] - kl["sae"]) / kl["mean"],
            **{f"ce_{kind}": value for kind, value in ce.items()},
            **{f"kl_{kind}": value for kind, value in kl.items()},
        }

    def fvu(self, key: str, x_hat: torch.Tensor) -> tuple[float, float]:
        """Return the squared error and the variance of the kept tokens at a port."""
        x = self.acts[key][self.keep]
        return float((x - x_hat[self.keep]).square().sum()), float((x - x.mean(0)).square().sum())

    def replacements(self, key: str, x_hat: torch.Tensor, less: torch.Tensor | float = 0.0) -> dict[str, torch.Tensor]:
        """Return the activations of the model at a port: reconstructed at the kept tokens, or zero or the mean everywhere."""
        x = self.acts[key]
        kinds = {"zero": torch.zeros_like(x), "mean": x[self.keep].mean(0).expand_as(x)}
        return {"sae": torch.where(self.keep[..., None], x_hat, x) + less, **{kind: y + less for kind, y in kinds.items()}}


@pytest.fixture(scope="module")
def reference(models, rows) -> Reference:
    with torch.no_grad():
        return Reference(models, rows)


def values(fit: dict[str, sl.evaluation.Metric], names) -> dict[str, float]:
    return {name: fit[name].value for name in names}


@torch.no_grad()
def test_ports_of_two_models_have_errors_and_losses_of_their_own(models, rows, reference):
    d = dictionary(*CROSS)
    report = sl.evaluate(d, models, rows, n_bootstrap=20)
    x_hat = dict(
        zip(CROSS, copy.deepcopy(d).double()(torch.cat([reference.acts[key] for key in CROSS], -1)).split(48, -1), strict=True)
    )
    new = {key: reference.replacements(key, part) for key, part in x_hat.items()}
    errors = {key: reference.fvu(key, part) for key, part in x_hat.items()}
    assert list(report.by_port) == list(CROSS)
    for key, fit in report.by_port.items():
        name, hook = key.split(":")
        error, variance = errors[key]
        wanted = {"fvu": error / variance, "explained_variance": 1 - error / variance, "mse": error / rows.n_kept}
        wanted |= reference.scores(name, {hook: new[key]})
        assert values(fit, wanted) == pytest.approx(wanted, rel=REL), key
        assert fit["fvu"].low < fit["fvu"].value < fit["fvu"].high
        assert fit["ce_loss_score"].low < fit["ce_loss_score"].high
    assert list(report.by_model) == ["base", "chat"]
    assert report.by_model["base"] == report.by_port[CROSS[0]]
    wanted = reference.scores("chat", {STREAM: new[CROSS[1]], MLP: new[CROSS[2]]})
    wanted["fvu"] = sum(errors[key][0] for key in CROSS[1:]) / sum(errors[key][1] for key in CROSS[1:])
    assert values(report.by_model["chat"], wanted) == pytest.approx(wanted, rel=REL)
    assert report["fvu"] == pytest.approx(sum(e for e, _ in errors.values()) / sum(v for _, v in errors.values()), rel=REL)
    assert report.model == "base = random, chat = chatty"
    assert not [name for name in report.metrics if name.startswith(("ce_", "kl_"))]


@torch.no_grad()
@pytest.mark.parametrize("hook", [STREAM, MLP])
def test_a_difference_is_put_into_the_model_that_it_is_subtracted_from(models, rows, reference, hook):
    """y_chat = x_base + x̂ at the kept tokens; zeros at the difference put the activation of base into chat."""
    key = f"chat-base:{hook}"
    d = dictionary(key)
    report = sl.evaluate(d, models, rows, n_bootstrap=5, by_position=True)
    x_hat = copy.deepcopy(d).double()(reference.acts[key])
    error, variance = reference.fvu(key, x_hat)
    wanted = {"fvu": error / variance}
    wanted |= reference.scores("chat", {hook: reference.replacements(key, x_hat, reference.acts[f"base:{hook}"])})
    assert values(report.metrics, wanted) == pytest.approx(wanted, rel=REL)
    assert wanted["ce_zero"] == pytest.approx(reference.losses("chat", {hook: reference.acts[f"base:{hook}"]})[0])
    assert (report.by_port, report.by_model) == (None, None)
    assert sum(band.n_tokens for band in report.by_position) == rows.n_kept


@torch.no_grad()
def test_a_dictionary_that_reads_one_model_and_writes_another(models, rows, reference):
    d = dictionary(f"base:{STREAM}", writes=(f"chat:{MLP}",))
    report = sl.evaluate(d, models, rows, n_bootstrap=5)
    x_hat = copy.deepcopy(d).double()(reference.acts[f"base:{STREAM}"])
    wanted = reference.scores("chat", {MLP: reference.replacements(f"chat:{MLP}", x_hat)})
    assert values(report.metrics, wanted) == pytest.approx(wanted, rel=REL)


@torch.no_grad()
def test_ports_of_one_model_are_replaced_together_and_each_alone(models, rows, reference):
    hooks = (STREAM, MLP)
    d = dictionary(*hooks)
    report = sl.evaluate(d, models["base"], rows, n_bootstrap=5)
    x_hat = copy.deepcopy(d).double()(torch.cat([reference.acts[f"base:{hook}"] for hook in hooks], -1)).split(48, -1)
    new = {hook: reference.replacements(f"base:{hook}", part) for hook, part in zip(hooks, x_hat, strict=True)}
    wanted = reference.scores("base", new)
    assert values(report.metrics, wanted) == pytest.approx(wanted, rel=REL)
    assert report.by_model is None
    for hook, fit in report.by_port.items():
        wanted = reference.scores("base", {hook: new[hook]})
        assert values(fit, wanted) == pytest.approx(wanted, rel=REL), hook
    named = sl.evaluate(dictionary(*(f"base:{hook}" for hook in hooks)), models, rows, n_bootstrap=5)
    assert named.metrics == report.metrics
    assert list(named.by_port.values()) == list(report.by_port.values())


def test_several_dictionaries_in_one_pass_and_batches_change_nothing(models, rows):
    several = [dictionary(*CROSS, seed=seed) for seed in (1, 2)]
    together = sl.evaluate(several, models, rows, n_bootstrap=5, batch_tokens=30)
    for d, report in zip(several, together, strict=True):
        alone = sl.evaluate(d, models, rows, n_bootstrap=5)
        for key, fit in alone.by_port.items():
            assert values(report.by_port[key], fit) == pytest.approx(values(fit, fit), rel=1e-5, abs=1e-6)


def test_long_rows_in_parts_have_the_same_losses(models, rows, monkeypatch):
    d = dictionary(f"chat-base:{STREAM}", f"base:{STREAM}")
    whole = sl.evaluate(d, models, rows[:2], n_bootstrap=0)
    monkeypatch.setattr(import_module("saelens_lite.evaluation.measure"), "MAX_ROW_LOGITS", 1)
    parts = sl.evaluate(d, models, rows[:2], n_bootstrap=0, batch_tokens=4)
    for key, fit in whole.by_port.items():
        assert values(parts.by_port[key], fit) == pytest.approx(values(fit, fit), rel=1e-4)


def test_controls_have_ports_and_leave_the_models_as_they_were(models, rows):
    before = {name: lm.fingerprint() for name, lm in models.items()}
    report = sl.evaluate(dictionary(*CROSS), models, rows, n_bootstrap=5, controls=True, by_frequency=True)
    assert {name: lm.fingerprint() for name, lm in models.items()} == before
    assert set(report.controls) == {"random", "PCA", "10 % permuted", "shuffled weights"}
    for control in report.controls.values():
        assert list(control.by_port) == list(CROSS)
        assert list(control.by_model) == ["base", "chat"]
    pca = report.controls["PCA"]
    assert pca["fvu"] < 0.5
    assert all(fit["fvu"].value < 1 for fit in pca.by_port.values())
    assert report.controls["shuffled weights"].by_model["chat"]["ce_clean"] != report.by_model["chat"]["ce_clean"]
    whole = sum(band.n_tokens for band in report.by_frequency)
    assert whole == rows.n_kept


def test_one_model_twice_is_one_model(models, rows):
    """The difference is zero, so nothing is lost whatever is replaced; the shuffled weights are shuffled once."""
    twice = {"base": models["base"], "chat": models["base"]}
    report = sl.evaluate(dictionary(*CROSS[:2]), twice, rows, n_bootstrap=5, controls=True)
    for kind in ("ce_clean", "ce_zero", "ce_mean"):
        assert report.by_model["base"][kind] == report.by_model["chat"][kind]
    assert report.controls["shuffled weights"].by_model["base"]["ce_clean"].value > report.by_model["base"]["ce_clean"].value


def test_a_report_with_ports_is_read_back_and_shown(models, rows, tmp_path):
    d = sl.Dictionary.create("topk", reads=[sl.Port.of(key, 48) for key in CROSS], d_sae=96, options={"k": 4})
    report = sl.evaluate(d, models, rows, n_bootstrap=5, controls=True)
    report.to_json(tmp_path / "eval.json")
    loaded = sl.EvalReport.from_json(tmp_path / "eval.json")
    assert loaded == report
    names = dict(report.lines())
    assert names[f"ce_loss_score of {CROSS[1]}"] == report.by_port[CROSS[1]]["ce_loss_score"]
    assert names["kl_sae of chat"] == report.by_model["chat"]["kl_sae"]
    assert "kl_sae of base" not in names  # base has one port, whose line says the same
    score = report.by_port[CROSS[2]]["ce_loss_score"].short
    shown = [str(report), report.to_markdown(), report._repr_html_(), as_text(report.table()), as_text(table({"d": report}))]
    for text in shown:
        assert score in text
        assert "at chat" in " ".join(text.split())  # names are folded in narrow tables
    assert len(report.columns()["metric"]) == 5 * len(names)
    one_hook = sl.evaluate(dictionary(*CROSS[:2]), models, rows, n_bootstrap=5)
    assert [line.split()[:2] for line in str(one_hook).splitlines()[-2:]] == [["at", "base"], ["at", "chat"]]
    one_port = sl.evaluate(dictionary(CROSS[0]), models, rows, n_bootstrap=5)
    assert not {"by_port", "by_model"} & json.loads(one_port.to_json()).keys()


def test_requests_that_several_models_cannot_meet(models, rows):
    d = dictionary(*CROSS)
    with pytest.raises(ConfigError, match="by_position measures the loss of one model; this dictionary writes base and chat"):
        sl.evaluate(d, models, rows, by_position=True)
    with pytest.raises(ConfigError, match=r"belongs to several models.*'base': …, 'chat': …"):
        sl.evaluate(d, models["base"], rows)
    with pytest.raises(ConfigError, match="no model 'chat'; the models are base"):
        sl.evaluate(d, {"base": models["base"]}, rows)
    with pytest.raises(ConfigError, match="both as it is and as a difference"):
        sl.evaluate(dictionary(f"chat:{MLP}", f"chat-base:{MLP}"), models, rows)
    with pytest.raises(ConfigError, match=r"evaluate\(d, lm, text\) needs a text"):
        sl.evaluate(d, models)
    centred = d.origin.replace(models=(ModelFacts(name="chat", model="chatty", processing=("center_writing_weights",)),))
    other = sl.Dictionary.create("l1", reads=d.reads, d_sae=8, origin=Origin(**centred.model_dump()))
    with pytest.raises(ConfigError, match="center_writing_weights=True"):
        sl.evaluate(other, models, rows)
