"""Splices, steering and attribution at the ports of several models, against independent torch hooks."""

import pytest

import saelens_lite as sl
from saelens_lite.cli.checks import named_models
from saelens_lite.config import ModelFacts, Origin
from saelens_lite.errors import ConfigError

HOOK = "blocks.1.hook_resid_pre"


# Which models


@pytest.mark.parametrize(
    ("values", "models"),
    [
        ([], {}),
        (["gpt2"], {}),
        (["./runs/a=b"], {}),
        (["base=gpt2", "chat=org/gpt2-chat"], {"base": "gpt2", "chat": "org/gpt2-chat"}),
        (["chat=C:\\models=new"], {"chat": "C:\\models=new"}),
    ],
)
def test_models_are_named_on_the_command_line(values, models):
    assert named_models(values) == models


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["base=gpt2", "gpt2"], r"--model gpt2: expected NAME=MODEL, such as --model base=gpt2"),
        (["gpt2", "tiny"], r"--model gpt2: expected NAME=MODEL"),
        (["base="], r"--model base=: expected NAME=MODEL"),
        (["base=gpt2", "base=tiny"], r"--model gives base twice: gpt2 and tiny"),
    ],
)
def test_models_without_a_name_of_their_own_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        named_models(values)


def test_model_for_loads_each_model_as_in_training():
    facts = (
        ModelFacts(name="base", model="tiny"),
        ModelFacts(name="chat", model="tiny", processing=("center_writing_weights",)),
    )
    ports = [sl.Port(hook=HOOK, width=192, model=name) for name in ("base", "chat")]
    d = sl.Dictionary.create("topk", reads=ports, d_sae=8, origin=Origin(models=facts))
    models = sl.model_for(d, device="cpu")
    assert {name: lm.processing for name, lm in models.models.items()} == {f.name: f.processing for f in facts}
    assert list(sl.model_for(d, name={"chat": "tiny"}, device="cpu").models) == ["chat"]
    with pytest.raises(ConfigError, match="revision = 'abc' is the commit of one model"):
        sl.model_for(d, revision="abc")
