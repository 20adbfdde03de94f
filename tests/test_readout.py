"""The parts between the last block and the logits: norms, projections and heads, against the model's own logits."""

import logging

import pytest
import torch
from torch import nn

import saelens_lite as sl
from saelens_lite.errors import ConfigError
from saelens_lite.features.weights import latent_weights

D_MODEL, N_VOCAB = 32, 97
TOKENS = torch.randint(20, N_VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
OPT = {"ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": D_MODEL, "dropout": 0.0}
LLAMA = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
LAST = "blocks.1.hook_resid_post"


class PackedHead(nn.Module):
    """A quantised head: its weight is a table of int8 and a scale for each row, and cannot be multiplied as it is."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.scales = weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight / self.scales).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * self.scales).T.to(x.dtype)


class AdaptedHead(nn.Linear):
    """A head with a low-rank addition, which its `weight` lacks."""

    def __init__(self, weight: torch.Tensor):
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight.data = weight.clone()
        self.low = torch.randn(weight.shape[1], 2, generator=torch.Generator().manual_seed(3))
        self.high = torch.randn(2, weight.shape[0], generator=torch.Generator().manual_seed(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.low @ self.high


class BentHead(AdaptedHead):
    """A head that is not linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


@pytest.fixture
def make(lm):
    """make("OPT", {…}, head=…): a model with two blocks and random weights."""
    import transformers

    def make(family: str, settings: dict, head=None) -> sl.LanguageModel:
        torch.manual_seed(0)
        sizes = {"vocab_size": N_VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": 2, "max_position_embeddings": 64}
        module = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**(sizes | settings)))
        for parameter in module.parameters():
            mean = float(parameter.detach().mean()) if parameter.ndim == 1 else 0.0
            nn.init.normal_(parameter, mean=mean, std=0.1 if parameter.ndim == 1 else 0.2)
        if head is not None:
            module.set_output_embeddings(head(module.get_output_embeddings().weight.detach()))
        return sl.LanguageModel(module, lm.tokenizer, name="random")

    return make


def dictionary(hook: str = "blocks.0.hook_resid_post") -> sl.Dictionary:
    torch.manual_seed(1)
    return sl.Dictionary.create("topk", reads=sl.Port(hook=hook, width=D_MODEL), d_sae=64, options={"k": 4})


@pytest.mark.parametrize(
    ("family", "settings", "head"),
    [
        ("OPT", OPT | {"do_layer_norm_before": False}, None),
        ("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, None),
        ("OPT", OPT, PackedHead),
        ("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, PackedHead),
        ("Llama", LLAMA, PackedHead),
        ("Llama", LLAMA, AdaptedHead),
    ],
)
def test_the_last_stream_becomes_logits_by_unembedding_and_divisor(make, family, settings, head):
    """Up to what is the same at all positions: the norm's bias."""
    model = make(family, settings, head)
    streams = []
    handle = model.blocks[-1].register_forward_hook(
        lambda _, args, out: streams.append(out[0] if isinstance(out, tuple) else out)
    )
    logits = model.logits(TOKENS)
    handle.remove()
    (stream,) = streams
    rest = logits - stream @ model.unembedding().T / model.final_norm_divisor(stream)[..., None]
    torch.testing.assert_close(rest, rest[:1, :1].expand_as(rest), rtol=0, atol=1e-4)
    assert model.unembedding().shape == (N_VOCAB, D_MODEL)


def test_a_packed_weight_is_read_to_the_bit(make):
    model = make("Llama", LLAMA, PackedHead)
    head = model.module.lm_head
    assert torch.equal(model.unembedding(fold_norm=False), head.weight.float() * head.scales)


def test_splices_on_the_head_do_not_change_its_weight(make):
    model = make("Llama", LLAMA, PackedHead)
    wanted = model.unembedding()
    with model.replace("unembed.hook_in", lambda x: x * 0), model.replace("unembed.hook_out", lambda x: x + 1):
        assert torch.equal(model.unembedding(), wanted)


@pytest.mark.parametrize("width", [D_MODEL, 16])
def test_latents_of_a_post_norm_model_promote_what_the_last_block_promotes(make, width, caplog):
    """Said in the log, since the norms inside later blocks do not count."""
    model = make("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": width})
    d = dictionary(LAST)
    with caplog.at_level(logging.WARNING):
        weights = latent_weights(d, model)
    assert "random has no final norm: effects on logits are those of its last block's output" in caplog.text
    with model.replace(LAST, lambda x: x + d.W_dec[7].detach()):
        changed = model.logits(TOKENS)
    effect = (changed - model.logits(TOKENS))[0, 0]
    assert weights.promoted[7].tolist() == effect.topk(10).indices.tolist()
    torch.testing.assert_close(weights.promoted_effect[7], effect.topk(10).values, rtol=1e-3, atol=1e-3)


def test_doses_of_a_post_norm_model(make):
    model = make("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16})
    d, tokens = dictionary(LAST), TOKENS[:1]
    found = sl.dose_response(d, model, 3, [2.0], tokens, n_controls=0)
    effect = model.module.lm_head(model.module.model.decoder.project_out(d.W_dec[3].detach()))
    promoted = effect.topk(10).indices
    clean = model.logits(tokens).log_softmax(-1)[0, 1:, promoted].logsumexp(-1)
    with model.replace(LAST, lambda x: torch.cat([x[:, :1], x[:, 1:] + 2 * d.W_dec[3].detach()], 1)):
        dosed = model.logits(tokens).log_softmax(-1)[0, 1:, promoted].logsumexp(-1)
    assert float(found.effect[0, 0, 0]) == pytest.approx(float((dosed - clean).mean()), rel=1e-4)


def test_logits_that_are_not_linear_have_no_direct_effects(make, caplog):
    """None in a store, none in an attribution; a metric that needs them is refused, others are not."""
    model, d = make("Llama", LLAMA, BentHead), dictionary()
    with pytest.raises(ConfigError, match=r"the head, a BentHead, is not linear"):
        model.unembedding()
    with caplog.at_level(logging.WARNING):
        weights = latent_weights(d, model)
    assert "no effects on logits: the head, a BentHead, is not linear" in caplog.text
    assert weights.promoted.shape == (64, 0)
    assert weights.decoder_neighbours.shape == (64, 10)
    assert sl.attribute(d, model, TOKENS[0], (5, 3), ablation=False).direct is None
    with pytest.raises(ConfigError, match="not linear"):
        sl.dose_response(d, model, 3, [1.0], TOKENS, n_controls=2)
    assert sl.dose_response(d, model, 3, [1.0], TOKENS, n_controls=2, metric=(5, 3)).effect.isfinite().all()


def test_a_head_behind_more_than_a_norm_has_no_direct_effects(lm):
    """BERT's, which has an MLP of its own."""
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    module = BertLMHeadModel(BertConfig(vocab_size=N_VOCAB, hidden_size=D_MODEL, is_decoder=True, **sizes))
    model = sl.LanguageModel(module, lm.tokenizer, name="bert")
    with pytest.raises(ConfigError, match=r"no direct effects on the logits of BertLMHeadModel: the output of its last block"):
        model.unembedding()


def test_a_norm_that_transformer_lens_does_not_know_of_is_not_left_out(make):
    """Its description of OPT has a projection in place of the norm; this model has both."""
    model = make("OPT", OPT | {"word_embed_proj_dim": 16})
    with pytest.raises(ConfigError, match="more than a norm and a projection between its last block and its head"):
        model.unembedding()


def test_fewer_than_ten_tokens(make):
    """All of them are promoted or suppressed; the metric on ten of them is refused."""
    model, d = make("Llama", LLAMA | {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 0}), dictionary()
    weights = latent_weights(d, model)
    effects = d.W_dec.detach() @ model.unembedding().T
    assert torch.equal(weights.promoted.long(), effects.argsort(1, descending=True))
    assert torch.equal(weights.suppressed.long(), effects.argsort(1))
    tokens = torch.randint(1, 8, (2, 9), generator=torch.Generator().manual_seed(1))
    with pytest.raises(ConfigError, match=r"'promoted' needs more than 10 tokens, but random has only 8; give another metric="):
        sl.dose_response(d, model, 3, [1.0], tokens, n_controls=1)
    assert sl.dose_response(d, model, 3, [1.0], tokens, n_controls=1, metric=(5, 3)).effect.isfinite().all()
