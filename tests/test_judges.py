"""Judges: dictionaries as other projects' evaluations take them, and the inputs of sae-probes."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import ConfigError, HookError, PluginError, ShapeError
from saelens_lite_plugins.judges.saebench import DenseSAE, dense_sae

RULES = ["topk", "l1", "gated", "batch_topk", "jumprelu", "matryoshka", "p_anneal", "group_max", "matching_pursuit"]
HOOK = "blocks.2.hook_resid_pre"


def dictionary(rule: str = "topk", d_in: int = 12, hook: str | None = HOOK, **origin) -> sl.Dictionary:
    """Return a dictionary with random biases, and with decoder rows of uneven norm if the rule allows them."""
    d = sl.Dictionary.create(rule, reads=sl.Port(hook=hook, width=d_in), d_sae=32, seed=3, origin=sl.Origin(**origin))
    generator = torch.Generator().manual_seed(4)
    for parameter in (d.b_enc, d.b_dec):
        if parameter is not None:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    if not d.rule.tied:
        d.W_dec.data.mul_(torch.linspace(0.5, 2, 32)[:, None])
    return d


def sae_bench(d: sl.Dictionary, **options) -> DenseSAE:
    return sl.judge("saebench", **options).sae(d)


def sae_probes(dictionaries, lm, **options) -> list:
    return sl.judge("saeprobes", **options).evaluate(dictionaries, lm)


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("rule", RULES)
def test_codes_and_reconstruction_are_the_dictionarys(rule):
    d, x = dictionary(rule), activations(3, 7, 12)
    sae = sae_bench(d)
    acts = sae.encode(x)
    assert acts.shape == (3, 7, 32)
    assert (acts != 0).any()
    assert torch.equal(acts, d.encode(x).to_dense())
    torch.testing.assert_close(sae.decode(acts), d(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(sae(x), sae.decode(acts))
    torch.testing.assert_close(sae.encode(x[0, 0]), acts[0, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_weights_have_the_names_that_judges_read(rule):
    d = dictionary(rule)
    sae = sae_bench(d)
    for name in ("W_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(sae, name), getattr(d, name))
    assert torch.equal(sae.b_enc, torch.zeros(32) if d.b_enc is None else d.b_enc)
    assert not any(parameter.requires_grad for parameter in sae.parameters())
    assert sae.device == torch.device("cpu")
    assert sae.dtype == torch.float32


CENTERED = ("center_writing_weights",)


def test_the_config_as_saebench_and_as_saelens_read_it():
    cfg = sae_bench(dictionary(model="gpt2", n_ctx=64, prepend_bos=True, text="books", processing=CENTERED)).cfg
    for place in (cfg, cfg.metadata):
        assert (place.model_name, place.hook_name, place.hook_layer, place.hook_head_index) == ("gpt2", HOOK, 2, None)
        assert (place.context_size, place.prepend_bos, place.dataset_path) == (64, True, "books")
        assert place.model_from_pretrained_kwargs == {"center_writing_weights": True}
        assert place.seqpos_slice == (None,)
    assert (cfg.d_in, cfg.d_sae, cfg.dtype, cfg.device, cfg.normalize_activations) == (12, 32, "float32", "cpu", "none")
    cfg.metadata.hook_layer = 3  # SAEBench writes there
    assert cfg.hook_layer == 2
    assert json.loads(json.dumps(cfg.to_dict()))["architecture"] == "saelens_lite.topk"


def test_architecture_names_differ_from_those_saebench_knows():
    assert sae_bench(dictionary("gated")).cfg.architecture_str != "gated"


def test_a_change_of_dtype_leaves_the_dictionary_alone():
    d, x = dictionary(), activations(5, 12)
    sae = sae_bench(d).to(device="cpu", dtype=torch.float64)
    assert (sae.dtype, sae.cfg.dtype, d.W_dec.dtype) == (torch.float64, "float64", torch.float32)
    assert (sae.cfg.metadata.dtype, sae.cfg.metadata.device) == ("float64", "cpu")
    assert sae.encode(x).dtype == sae(x).dtype == torch.float64
    torch.testing.assert_close(sae(x).float(), d(x), rtol=1e-5, atol=1e-6)
    sae.W_dec.zero_()
    assert d.W_dec.abs().min() > 0


def test_a_dictionary_in_training_is_judged_as_it_will_be_used():
    d, x = dictionary("batch_topk"), activations(6, 12)
    expected = d.encode(x).to_dense()
    d.train()
    assert torch.equal(sae_bench(d).encode(x), expected)
    assert d.training


def test_a_skip_connection_is_part_of_the_output():
    d = sl.Dictionary.create("l1", reads=sl.Port(hook=HOOK, width=12), writes=6, d_sae=32, skip=True)
    torch.nn.init.normal_(d.W_skip, generator=torch.Generator().manual_seed(0))
    x = activations(5, 12)
    torch.testing.assert_close(dense_sae(d)(x), d(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("token_norm", ["layer_norm", "constant_norm"])
def test_a_dictionary_that_normalises_each_activation(token_norm):
    """Decoded activations have the norm of the activations that were encoded last, as in SAELens."""
    plain = dictionary()
    d = sl.Dictionary(plain.rule, reads=plain.reads, d_sae=32, origin=plain.origin, token_norm=token_norm)
    d.load_state_dict(plain.state_dict())
    sae, x = sae_bench(d), activations(4, 7, 12) * 3 + 1
    torch.testing.assert_close(sae.decode(sae.encode(x)), d(x).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), d(x).detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=rf"undoes the {token_norm} of each activation, and the activations encoded last"):
        sae.decode(torch.zeros(5, 32))


def test_hook_z_is_not_reshaped():
    sae = sae_bench(dictionary(hook="blocks.1.attn.hook_z"))
    sae.turn_off_forward_pass_hook_z_reshaping()
    assert sae.hook_z_reshaping_mode is False
    assert sae.cfg.hook_layer == 1


def test_hooks_outside_blocks_are_refused():
    with pytest.raises(ConfigError, match="does not say which hook it belongs to; give hook="):
        sae_bench(dictionary(hook=None))
    with pytest.raises(ConfigError, match=r"'ln_final.hook_normalized': the evaluations need a hook inside a block"):
        sae_bench(dictionary(), hook="ln_final.hook_normalized")
    assert sae_bench(dictionary(hook=None), hook="blocks.0.hook_mlp_out").cfg.hook_name == "blocks.0.hook_mlp_out"


def transcoder(d_in: int) -> sl.Dictionary:
    reads, writes = (sl.Port(hook=f"blocks.2.{name}", width=d_in) for name in ("ln2.hook_out", "hook_mlp_out"))
    return sl.Dictionary.create("topk", reads=reads, writes=writes, d_sae=64, options={"k": 3})


def test_a_transcoder_is_not_given_to_judges_of_autoencoders():
    with pytest.raises(ConfigError, match=r"blocks.2.ln2.hook_out → blocks.2.hook_mlp_out: SAEBench"):
        sae_bench(transcoder(12))


@torch.no_grad()
def judged_as_saelens_does(sae: DenseSAE, lm: sl.LanguageModel, tokens: torch.Tensor) -> dict[str, float]:
    """Return a few metrics, computed from the object as an evaluation does: dense codes of [batch pos d_in], without special
    tokens.
    """
    x = lm.run(tokens, sae.cfg.metadata.hook_name)[sae.cfg.metadata.hook_name]
    acts = sae.encode(x.to(sae.device))
    keep = (tokens != lm.bos_id).flatten()
    kept, x_hat, flat = acts.flatten(0, 1)[keep], sae.decode(acts).flatten(0, 1)[keep], x.flatten(0, 1)[keep].double()
    error = (flat - x_hat).square().sum(1)
    fired = torch.zeros(sae.cfg.d_sae, device=sae.device) + (kept != 0).any(0)
    return {
        "l0": float((kept != 0).sum(1).double().mean()),
        "mse": float(error.mean()),
        "explained_variance": float(1 - error.sum() / (flat - flat.mean(0)).square().sum()),
        "frac_alive": float(fired.mean()),
    }


def test_an_evaluation_of_the_object_agrees_with_ours(lm, documents):
    d = dictionary("topk", d_in=lm.d_model, model="tiny", n_ctx=24)
    tokens = lm.to_tokens(documents).tokens[:, :24]
    report = sl.evaluate(d, lm, sl.tokens.TokenRows(tokens, tokens != lm.bos_id), n_bootstrap=2)
    for name, value in judged_as_saelens_does(sae_bench(d), lm, tokens).items():
        ours = report.frac_alive if name == "frac_alive" else report[name]
        assert ours == pytest.approx(value, rel=1e-5), name


# sae-probes itself needs older releases of our dependencies, so a stand-in with its interface replaces it here. The script
# scripts/comparisons/probe_table.py runs the real package in a separate environment.

TEXTS = ["the quick brown fox " * 40, "a lazy dog", "twelve o'clock"]


@pytest.fixture
def judge(monkeypatch) -> SimpleNamespace:
    """A stand-in for sae-probes that keeps its inputs."""
    seen = SimpleNamespace(activations={}, saes=[], generated=0)

    def ensure_dataset_activations(
        model_name, dataset_short_names, hook_names, model_cache_path, device, max_seq_len, batch_size, model
    ):
        (dataset,), (hook,) = dataset_short_names, hook_names
        model.tokenizer.truncation_side, model.tokenizer.padding_side = "left", "right"
        lengths = [len(model.tokenizer(text)["input_ids"]) for text in TEXTS]
        batch = model.tokenizer(TEXTS, padding=True, truncation=True, max_length=max_seq_len, return_tensors="pt").to(device)
        _, found = model.run_with_cache(batch["input_ids"], names_filter=[hook], stop_at_layer=3)
        last = [min(length - 1, max_seq_len - 1) for length in lengths]
        seen.activations[dataset, hook] = torch.stack([found[hook][i, at] for i, at in enumerate(last)])
        seen.generated += 1

    def write(results_path, name, rows):
        print("Saving results")
        folder = Path(results_path) / name / "normal_setting"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(rows))

    def run_sae_evals(sae, model_name, hook_name, reg_type, setting, ks, results_path, model_cache_path, datasets, device):
        acts = sae.encode(seen.activations[datasets[0], hook_name].to(device)).cpu().float()
        seen.saes.append((sae, reg_type, setting))
        write(results_path, "sae_probes_model", [row(k=k, auc=float((acts != 0).sum()) / (1000 * k)) for k in ks])

    def run_baseline_evals(model_name, hook_name, setting, results_path, model_cache_path, datasets, device):
        write(results_path, "baseline_results_model", [row(auc=0.9)])

    def row(auc, **more):
        return {"test_auc": auc, "test_acc": 0.75, "test_f1": 0.7, "val_auc": 0.8, **more}

    package, generate = ModuleType("sae_probes"), ModuleType("sae_probes.generate_model_activations")
    package.DATASETS = ["5_hist_fig_ismale", "7_hist_fig_ispolitician"]
    package.run_sae_evals, package.run_baseline_evals = run_sae_evals, run_baseline_evals
    generate.ensure_dataset_activations = ensure_dataset_activations
    monkeypatch.setitem(sys.modules, "sae_probes", package)
    monkeypatch.setitem(sys.modules, "sae_probes.generate_model_activations", generate)
    return seen


def test_probes_of_several_dictionaries(lm, judge, capsys):
    few = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=64, options={"k": 2})
    more = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=64, options={"k": 5})
    reports = sae_probes([few, more], lm, ks=(1, 4))
    assert judge.generated == 2  # a data set is read once for all dictionaries
    assert [(sae.dictionary.rule.config.k, *rest) for sae, *rest in judge.saes] == [
        (2, "l1", "normal"),
        (5, "l1", "normal"),
    ] * 2
    for report, k in zip(reports, (2, 5), strict=True):
        assert (report.model, report.hook) == ("tiny", HOOK)
        assert [(p.dataset, p.k, p.auc) for p in report.probes[:3]] == [
            ("5_hist_fig_ismale", 1, 3 * k / 1000),
            ("5_hist_fig_ismale", 4, 3 * k / 4000),
            ("5_hist_fig_ismale", None, 0.9),
        ]
        assert report.mean_auc(None) == pytest.approx(0.9)
        assert "7_hist_fig_ispolitician" in str(report)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("bos", [True, None, False])
def test_the_activation_is_that_of_the_last_token_of_the_text(lm, judge, bos):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=64, origin=sl.Origin(prepend_bos=bos))
    sae_probes([d], lm, datasets=["5_hist_fig_ismale"], ks=[1])
    front = [] if bos is False else [lm.bos_id]
    for text, found in zip(TEXTS, judge.activations["5_hist_fig_ismale", HOOK], strict=True):
        ids = lm.tokenizer(text)["input_ids"]
        ids = torch.tensor([front + ids[-(lm.n_ctx - len(front)) :]])
        wanted = lm.run(ids, HOOK)[HOOK][0, -1]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_codes_of_a_transcoder_can_be_probed(lm, judge):
    (report,) = sae_probes([transcoder(lm.d_model)], lm, datasets=["5_hist_fig_ismale"], ks=[1])
    assert report.hook == "blocks.2.ln2.hook_out"
    assert report.mean_auc(1) == pytest.approx(9 / 1000)  # three texts, three latents each


def test_bad_requests_for_probes_are_refused(lm, judge):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=8, options={"k": 2})
    with pytest.raises(ConfigError, match="no data set '5_hist_fig_ismail'; did you mean 5_hist_fig_ismale"):
        sae_probes([d], lm, datasets=["5_hist_fig_ismail"], ks=[1])
    with pytest.raises(ConfigError, match="datasets is empty: name at least one"):
        sae_probes([d], lm, ks=[1], datasets=[])
    for ks in ([1, 9], [0], []):
        with pytest.raises(ConfigError, match=r"ks = .*: expected numbers of latents from 1 to 8"):
            sae_probes([d], lm, ks=ks)
    other = sl.Dictionary.create("topk", reads=sl.Port(hook="blocks.1.hook_resid_pre", width=lm.d_model), d_sae=8)
    with pytest.raises(ConfigError, match=r"one hook; found blocks\.1\.hook_resid_pre, blocks\.2\.hook_resid_pre"):
        sae_probes([d, other], lm, ks=[1])
    with pytest.raises(ConfigError, match="one hook; found no dictionary"):
        sae_probes([], lm, ks=[1])
    with pytest.raises(HookError, match="blocks"):
        sae_probes([d], lm, ks=[1], hook="blocks.9.hook_resid_pre")
    with pytest.raises(ShapeError, match=rf"\[\.\.\., {lm.d_model + 1}\]"):
        sae_probes([sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model + 1), d_sae=64)], lm)
    assert not judge.generated
    (report,) = sae_probes([d], lm, ks=[1])
    with pytest.raises(ConfigError, match=r"k = 3: no such probe; the report has k = \[1\]"):
        report.mean_auc(3)


def test_without_sae_probes(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_probes", None)
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=64)
    with pytest.raises(ConfigError, match=r"needs sae-probes \(.*\): pip install 'saelens-lite\[saeprobes\]'"):
        sae_probes([d], lm)


def test_a_missing_method_of_a_judge_names_the_other(lm):
    with pytest.raises(ConfigError, match=r"saebench cannot be run from here; give sae\(dictionary\) to the project's own"):
        sl.judge("saebench").evaluate([dictionary()], lm)
    with pytest.raises(ConfigError, match=r"saeprobes takes no SAE object; call evaluate\(dictionaries, lm\)"):
        sl.judge("saeprobes").sae(dictionary())


def test_judges_and_their_options_are_checked_by_name():
    with pytest.raises(PluginError, match="no judges plugin is called 'saebensh'; did you mean saebench"):
        sl.judge("saebensh")
    with pytest.raises(ConfigError, match="unknown key 'dataset'; did you mean datasets"):
        sl.judge("saeprobes", dataset=["5_hist_fig_ismale"])
