"""The check of a dictionary's hook: the place of training is named, and only wrong claims are warned of."""

import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from check_hooks import AT, Case, acts_at, fault, model, token_rows

import saelens_lite as sl
from saelens_lite.errors import ConfigError, ShapeError, TextError
from saelens_lite.evaluation import HookFit
from saelens_lite.evaluation.placement import _better

MLP, NORMED, STREAM = f"{AT}.mlp.hook_out", f"{AT}.hook_mlp_out", f"{AT}.hook_resid_post"
ROWS = token_rows(300, seed=1)


@pytest.fixture(scope="module")
def gemma():
    return model("Gemma2")


@pytest.fixture(scope="module")
def of_mlp(gemma):
    return made(gemma, Case(MLP, "", MLP))


def made(lm: sl.LanguageModel, case: Case) -> sl.Dictionary:
    """Return a dictionary of the principal components at the place of training, each in both directions."""
    x = acts_at(lm, token_rows(300), case.trained)
    x = x - x.mean(-1, keepdim=True) if case.change == "centred" else x
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=case.claimed, width=48), d_sae=96, options={"k": 12})
    with torch.no_grad():
        d.W_dec.copy_(torch.cat([axes, -axes]))
        d.W_enc.copy_(d.W_dec.T)
        d.b_dec.copy_(x.mean(0))
        d.b_enc.zero_()
    return d


def claiming(d: sl.Dictionary, hook: str | None, foreign: bool = False) -> sl.Dictionary:
    """Return the dictionary with another hook, as one of this project or as one of another tool."""
    port = sl.Port(hook=hook, width=d.d_in)
    origin, training = d.origin, {"read_from": {"format": "sparsify"}} if foreign else {}
    other = sl.Dictionary(d.rule, reads=(port,), d_sae=d.d_sae, origin=origin, training=training)
    other.load_state_dict(d.state_dict())
    return other


@pytest.mark.parametrize("case", [Case(MLP, "", MLP), Case(MLP, "", NORMED), Case(NORMED, "", MLP), Case(STREAM, "", STREAM)])
def test_the_place_of_training_is_named_and_only_wrong_claims_are_warned_of(gemma, case):
    check = sl.check_hook(made(gemma, case), gemma, ROWS, n_tokens=1000)
    assert fault(case, check) == ""
    assert check.n_tokens >= 1000


def test_of_a_transcoder_one_side_varies_at_a_time(lm):
    reads, writes = f"{AT}.ln2.hook_out", f"{AT}.hook_mlp_out"
    ports = (sl.Port(hook=hook, width=lm.d_model) for hook in (reads, writes))
    d = sl.Dictionary.create("topk", reads=next(ports), writes=next(ports), d_sae=64, options={"k": 4})
    places = sl.check_hook(d, lm, "a text of a few words, no more").places
    assert all(reads == place.reads or writes == place.writes for place in places)
    assert {f"{AT}.hook_resid_mid", f"{AT}.ln1.hook_out", "blocks.2.ln2.hook_out"} <= {place.reads for place in places}
    assert {f"{AT}.hook_resid_post", f"{writes}, scaled", "blocks.2.hook_mlp_out"} <= {place.writes for place in places}


@torch.no_grad()
def test_the_numbers_are_those_of_a_float64_computation(gemma, of_mlp):
    check = sl.check_hook(of_mlp, gemma, ROWS[:20], n_tokens=10_000)
    here = {str(place): place for place in check.places}
    acts = {name: x.flatten(0, 1) for name, x in gemma.run(ROWS[:20], [MLP, NORMED]).items()}
    wanted = {MLP: acts[MLP], NORMED: acts[NORMED], f"{MLP}, scaled": acts[MLP] * (48**0.5 / acts[MLP].norm(dim=1).mean())}
    wanted[f"{MLP}, centred"] = acts[MLP] - acts[MLP].mean(1, keepdim=True)
    for name, x in wanted.items():
        codes = of_mlp.encode(x)
        error = x.double() - of_mlp.decode(codes, x).double()
        fvu = error.square().sum() / (x.double() - x.double().mean(0)).square().sum()
        assert here[name].fvu == pytest.approx(float(fvu), rel=1e-5)
        assert here[name].l0 == pytest.approx(float(codes.l0.float().mean()), rel=1e-6)
    assert check.claimed == check.best == here[MLP]
    assert f"{AT}.ln2_post.hook_in" not in here
    assert [place.fvu for place in check.places] == sorted(place.fvu for place in check.places)


def test_places_with_the_same_tensor_are_listed_once(lm):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=f"{AT}.hook_mlp_out", width=lm.d_model), d_sae=64, options={"k": 4})
    named = [place.reads for place in sl.check_hook(d, lm, "a text of a few words, no more").places]
    assert f"{AT}.hook_mlp_out" in named
    assert f"{AT}.mlp.hook_out" not in named
    assert {"blocks.0.hook_mlp_out", "blocks.2.hook_mlp_out", f"{AT}.hook_resid_post"} <= set(named)


@pytest.mark.parametrize(
    ("own", "other", "warns"),
    [
        ((9.8, 8), (0.26, 81), True),  # a public dictionary on the wrong tensor and on the right one
        ((0.30, 60), (0.15, 150), False),  # more latents lower the error of a dictionary at its own place
        ((0.30, 32), (0.25, 32), False),
        ((0.30, 32), (0.15, 32), True),
        ((3.0, 8), (0.1, 900), False),  # nearly dense codes
        ((3.0, 8), (0.9, 8), False),
    ],
)
def test_another_place_is_better_only_by_a_margin_and_with_few_latents(own, other, warns):
    d = sl.Dictionary.create("topk", reads=1024, d_sae=1024, options={"k": 4})
    claimed, beside = (HookFit(name, name, *numbers, name == "a") for name, numbers in (("a", own), ("b", other)))
    assert (_better(sorted([claimed, beside], key=lambda place: place.fvu), d) == beside) is warns


def test_a_dictionary_without_a_hook_is_measured_at_all_of_them(gemma, of_mlp):
    check = sl.check_hook(claiming(of_mlp, None), gemma, ROWS, n_tokens=1000)
    assert check.best.reads == check.places[0].reads == MLP
    assert {place.reads.split(".")[1] for place in check.places} == {"0", "1", "2"}
    assert not check.warning


def test_evaluate_warns_of_a_wrong_hook_of_another_tool(gemma, of_mlp, caplog):
    def warnings(d: sl.Dictionary) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            sl.evaluate(d, gemma, ROWS[:40], n_bootstrap=0)
        return [record.message for record in caplog.records if "fits this dictionary clearly better" in record.message]

    (warning,) = warnings(claiming(of_mlp, NORMED, foreign=True))
    assert warning.startswith(f"{MLP} fits this dictionary clearly better than its hook {NORMED}: fvu 0.")
    assert warnings(claiming(of_mlp, MLP, foreign=True)) == warnings(claiming(of_mlp, NORMED)) == []


def test_the_result_is_a_table_that_marks_the_claimed_place(gemma, of_mlp):
    check = sl.check_hook(claiming(of_mlp, NORMED), gemma, ROWS.tokens, n_tokens=500)
    marked = [line.split() for line in str(check).splitlines() if line.endswith(("  claimed", "  better"))]
    assert [(line[0], line[-1]) for line in marked] == [(MLP, "better"), (NORMED, "claimed")]
    assert "clearly better" in str(check)
    assert check.columns()["claimed"].count(True) == 1
    assert f"<td>{NORMED}</td>" in check._repr_html_()
    assert replace(check, better=None).warning == ""


def test_dictionaries_and_texts_that_cannot_be_checked_are_refused(gemma, of_mlp):
    ports = [sl.Port(hook=f"blocks.{i}.hook_resid_pre", width=48) for i in range(2)]
    several = sl.Dictionary.create("topk", reads=ports, d_sae=64, options={"k": 4})
    with pytest.raises(ConfigError, match=r"has several: blocks\.0\.hook_resid_pre \+ blocks\.1"):
        sl.check_hook(several, gemma, ROWS)
    with pytest.raises(ConfigError, match="n_tokens = 0"):
        sl.check_hook(of_mlp, gemma, ROWS, n_tokens=0)
    with pytest.raises(TextError, match="no text to check the hook on"):
        sl.check_hook(of_mlp, gemma, ROWS._replace(keep=torch.zeros_like(ROWS.keep)))


def test_hooks_of_another_width_are_typed_errors(gemma, of_mlp):
    foreign = claiming(of_mlp, MLP, foreign=True)
    narrow = f"{AT}.attn.hook_z.head_0"
    for measure in (sl.check_hook, sl.evaluate):
        with pytest.raises(ShapeError, match=r"takes .*48"):
            measure(foreign, gemma, ROWS[:20], hook=narrow)
    writes = sl.Port(hook=narrow, width=48)
    transcoder = sl.Dictionary.create("topk", reads=sl.Port(hook=MLP, width=48), writes=writes, d_sae=64, options={"k": 4})
    with pytest.raises(ShapeError, match=r"head_0 has width \d+; expected 48"):
        sl.check_hook(transcoder, gemma, ROWS[:20])


def test_heads_are_compared_with_each_other_and_with_the_output(gemma):
    def places(hook: str) -> set[str]:
        width = gemma.run(ROWS[:1], [hook])[hook].shape[-1]
        d = sl.Dictionary.create("topk", reads=sl.Port(hook=hook, width=width), d_sae=64, options={"k": 4})
        return {place.reads for place in sl.check_hook(d, gemma, ROWS[:20]).places}

    n_heads = gemma.module.config.num_attention_heads
    assert {f"{AT}.attn.hook_z.head_{i}" for i in range(n_heads)} <= places(f"{AT}.attn.hook_z.head_1")
    assert f"{AT}.hook_attn_out" in places(f"{AT}.attn.hook_out")


def test_heads_side_by_side_are_compared_with_the_output(lm):
    hook = f"{AT}.hook_attn_out"
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=hook, width=lm.d_model), d_sae=64, options={"k": 4})
    assert f"{AT}.attn.hook_z" in {place.reads for place in sl.check_hook(d, lm, "a text of a few words, no more").places}


def test_places_of_several_models_are_not_compared(lm):
    port = sl.Port(hook=f"{AT}.hook_attn_out", width=lm.d_model, model="chat")
    d = sl.Dictionary.create("topk", reads=port, d_sae=64, options={"k": 4})
    with pytest.raises(
        ConfigError,
        match="is for dictionaries of one hook of one model, and takes that model alone; this one is of chat:blocks",
    ):
        sl.check_hook(d, {"chat": lm}, "a text of a few words, no more")
    assert sl.check_hook(d, lm, "a text of a few words, no more").claimed.reads == port.hook
    minus = sl.Dictionary.create("topk", reads=port.replace(minus="base"), d_sae=64, options={"k": 4})
    with pytest.raises(ConfigError, match="evaluate gives the error of each port"):
        sl.check_hook(minus, lm, "a text of a few words, no more")


def test_a_name_in_place_of_a_dictionary_is_a_typed_error():
    code = """
import saelens_lite as sl
for call in (sl.model_for, sl.labels.from_neuronpedia, lambda d: sl.check_hook(d, None, "text")):
    try:
        call("a/b")
    except sl.errors.ConfigError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("'a/b' is not a dictionary; give one, such as sl.load('a/b')") == 3
    with pytest.raises(ConfigError, match="no dictionary to load the model of"):
        sl.model_for()
