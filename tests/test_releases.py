"""The index of public dictionaries: what it describes, and the search in it."""

import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import product

import pytest
import releases as script
from hub_server import Account, Fault, running_hub
from huggingface_hub import close_session
from test_hub import TOKEN, connect

from saelens_lite import registry
from saelens_lite.errors import ConfigError, HubNotFoundError, HubUnreachableError
from saelens_lite.find_releases import PublicDictionaries, _bounds, find
from saelens_lite.hub_client.client import Address
from saelens_lite.releases import FILE, Entry, _combinations, entries, entry, entry_at, releases, width_of

EVERY = list(entries())
NAMES = {one.name: one for one in EVERY}
# Names, repositories, paths, L0 and Neuronpedia ids, drawn at random from the registry of SAELens 6.54.
SAMPLE = [
    (
        "gemma-scope-2-27b-pt-res-all/layer_6_width_262k_l0_big",
        "google/gemma-scope-2-27b-pt",
        "resid_post_all/layer_6_width_262k_l0_big",
        77,
        None,
    ),
    (
        "gemma-scope-9b-pt-att/layer_22/width_16k/average_l0_569",
        "google/gemma-scope-9b-pt-att",
        "layer_22/width_16k/average_l0_569",
        569,
        None,
    ),
    (
        "gemma-scope-9b-pt-res-canonical/layer_6/width_16k/canonical",
        "google/gemma-scope-9b-pt-res",
        "layer_6/width_16k/average_l0_93",
        None,
        "gemma-2-9b/6-gemmascope-res-16k",
    ),
    (
        "gpt2-small-mlp-out-v5-128k/blocks.1.hook_mlp_out",
        "jbloom/GPT2-Small-OAI-v5-128k-mlp-out-SAEs",
        "v5_128k_layer_1",
        None,
        "gpt2-small/1-mlp_128k-oai",
    ),
    (
        "gpt2-small-hook-z-kk/blocks.5.hook_z",
        "ckkissane/attn-saes-gpt2-small-all-layers",
        "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds49152_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9.pt",
        17.0,
        "gpt2-small/5-att-kk",
    ),
    (
        "llama-3-8b-it-res-jh/blocks.25.hook_resid_post",
        "Juliushanhanhan/llama-3-8b-it-res",
        "blocks.25.hook_resid_post",
        None,
        "llama3-8b-it/25-res-jh",
    ),
    (
        "llama_scope_lxa_32x/l1a_32x",
        "fnlp/Llama3_1-8B-Base-LXA-32x",
        "Llama3_1-8B-Base-L1A-32x",
        50.0,
        "llama3.1-8b/1-llamascope-att-131k",
    ),
    (
        "llama_scope_lxa_8x/l26a_8x",
        "fnlp/Llama3_1-8B-Base-LXA-8x",
        "Llama3_1-8B-Base-L26A-8x",
        50.0,
        "llama3.1-8b/26-llamascope-att-32k",
    ),
    (
        "llama_scope_lxm_32x/l26m_32x",
        "fnlp/Llama3_1-8B-Base-LXM-32x",
        "Llama3_1-8B-Base-L26M-32x",
        50.0,
        "llama3.1-8b/26-llamascope-mlp-131k",
    ),
    (
        "llama_scope_lxm_8x/l4m_8x",
        "fnlp/Llama3_1-8B-Base-LXM-8x",
        "Llama3_1-8B-Base-L4M-8x",
        50.0,
        "llama3.1-8b/4-llamascope-mlp-32k",
    ),
    (
        "llama_scope_lxr_32x/l6r_32x",
        "fnlp/Llama3_1-8B-Base-LXR-32x",
        "Llama3_1-8B-Base-L6R-32x",
        50.0,
        "llama3.1-8b/6-llamascope-res-131k",
    ),
    (
        "llama_scope_lxr_8x/l8r_8x",
        "fnlp/Llama3_1-8B-Base-LXR-8x",
        "Llama3_1-8B-Base-L8R-8x",
        50.0,
        "llama3.1-8b/8-llamascope-res-32k",
    ),
    (
        "llama_scope_r1_distill/l8r_400m_slimpajama_400m_openr1_math",
        "fnlp/Llama-Scope-R1-Distill",
        "400M-Slimpajama-400M-OpenR1-Math-220k/L8R",
        None,
        "deepseek-r1-distill-llama-8b/8-llamascope-slimpj-openr1-res-32k",
    ),
    (
        "mistral-7b-res-wg/blocks.16.hook_resid_pre",
        "JoshEngels/Mistral-7B-Residual-Stream-SAEs",
        "mistral_7b_layer_16",
        74,
        None,
    ),
    (
        "pythia-70m-deduped-res-sm/blocks.5.hook_resid_post",
        "ctigges/pythia-70m-deduped__res-sm_processed",
        "5-res-sm",
        None,
        "pythia-70m-deduped/5-res-sm",
    ),
    (
        "sae_bench_gemma-2-2b_vanilla_width-2pow14_date-1109/blocks.12.hook_resid_post__trainer_1_step_146",
        "canrager/saebench_gemma-2-2b_width-2pow14_date-1109",
        "gemma-2-2b_vanilla_width-2pow14_date-1109/resid_post_layer_12_checkpoints/trainer_1_step_146",
        None,
        "gemma-2-2b/12-sae_bench-standard-res-16k__trainer_1_step_146",
    ),
    (
        "sae_bench_pythia70m_sweep_gated_ctx128_0730/blocks.4.hook_resid_post__trainer_14",
        "canrager/lm_sae",
        "pythia70m_sweep_gated_ctx128_0730/resid_post_layer_4/trainer_14",
        None,
        "pythia-70m-deduped/4-sae_bench-gated-res-16k__trainer_14_step_final",
    ),
    (
        "sae_bench_pythia70m_sweep_panneal_ctx128_0730/blocks.3.hook_resid_post__trainer_3",
        "canrager/lm_sae",
        "pythia70m_sweep_panneal_ctx128_0730/resid_post_layer_3/trainer_3",
        None,
        "pythia-70m-deduped/3-sae_bench-panneal-res-16k__trainer_3_step_final",
    ),
    (
        "sae_bench_pythia70m_sweep_standard_ctx128_0712/blocks.3.hook_resid_post__trainer_16",
        "canrager/lm_sae",
        "pythia70m_sweep_standard_ctx128_0712/resid_post_layer_3/trainer_16",
        None,
        "pythia-70m-deduped/3-sae_bench-standard-res-4k__trainer_16_step_final",
    ),
    (
        "sae_bench_pythia70m_sweep_topk_ctx128_0730/blocks.3.hook_resid_post__trainer_9",
        "canrager/lm_sae",
        "pythia70m_sweep_topk_ctx128_0730/resid_post_layer_3/trainer_9",
        None,
        "pythia-70m-deduped/3-sae_bench-topk-res-4k__trainer_9_step_final",
    ),
    (
        "gemma-2-9b-res-matryoshka-dc/blocks.30.hook_resid_post",
        "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60",
        "blocks.30.hook_resid_post",
        60.0,
        None,
    ),
    (
        "gemma-scope-2b-pt-transcoders/layer_21/width_16k/average_l0_13",
        "google/gemma-scope-2b-pt-transcoders",
        "layer_21/width_16k/average_l0_13",
        13,
        "gemma-2-2b/21-gemmascope-transcoder-16k",
    ),
    (
        "mwhanna-qwen3-14b-transcoders/layer_13",
        "mwhanna/qwen3-14b-transcoders",
        "layer_13.safetensors",
        None,
        "qwen3-14b/13-transcoder-hp",
    ),
    ("mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_10", "mntss/clt-gemma-2-2b-2.5M", "10", None, "gemma-2-2b/10-clt-hp"),
    (
        "llama-3.1-8b-instruct-andyrdt/resid_post_layer_15_trainer_1",
        "andyrdt/saes-llama-3.1-8b-instruct",
        "resid_post_layer_15/trainer_1",
        None,
        "llama3.1-8b-it/15-resid-post-aa",
    ),
    (
        "qwen2.5-7b-instruct-andyrdt/resid_post_layer_3_trainer_1",
        "andyrdt/saes-qwen2.5-7b-instruct",
        "resid_post_layer_3/trainer_1",
        None,
        "qwen2.5-7b-it/3-resid-post-aa",
    ),
    (
        "gpt-oss-20b-andyrdt/resid_post_layer_23_trainer_0",
        "andyrdt/saes-gpt-oss-20b",
        "resid_post_layer_23/trainer_0",
        None,
        "gpt-oss-20b/23-resid-post-aa",
    ),
    (
        "goodfire-llama-3.1-8b-instruct/layer_19",
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        91,
        "llama3.1-8b-it/19-resid-post-gf",
    ),
    (
        "saebench_gemma-2-2b_width-2pow16_date-0107/blocks.12.hook_resid_post__trainer_0",
        "canrager/saebench_gemma-2-2b_width-2pow16_date-0107",
        "gemma-2-2b_matryoshka_batch_top_k_width-2pow16_date-0107/resid_post_layer_12/trainer_0",
        None,
        "gemma-2-2b/12-sae_bench-matryoshka-res-65k__trainer_0_step_final",
    ),
    (
        "temporal-sae-gemma-2-2b/blocks.12.hook_resid_post",
        "canrager/temporalSAEs",
        "gemma-2-2B/layer_12/temporal",
        192,
        "gemma-2-2b/12-temporal-res",
    ),
    (
        "deepseek-r1-distill-llama-8b-qresearch/blocks.19.hook_resid_post",
        "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19",
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        None,
        "deepseek-r1-distill-llama-8b/19-qresearch-res-65k",
    ),
    ("qwen-scope-3.5-2b-base-w32k-l100/layer0", "Qwen/SAE-Res-Qwen3.5-2B-Base-W32K-L0_100", "layer0.sae.pt", 100, None),
    (
        "gemma-scope-2-4b-pt-mlp-all/layer_19_width_262k_l0_small",
        "google/gemma-scope-2-4b-pt",
        "mlp_out_all/layer_19_width_262k_l0_small",
        20,
        None,
    ),
    (
        "gemma-scope-2b-pt-res/layer_21/width_65k/average_l0_111",
        "google/gemma-scope-2b-pt-res",
        "layer_21/width_65k/average_l0_111",
        111,
        None,
    ),
    (
        "gemma-scope-2b-pt-att-canonical/layer_19/width_65k/canonical",
        "google/gemma-scope-2b-pt-att",
        "layer_19/width_65k/average_l0_106",
        None,
        "gemma-2-2b/19-gemmascope-att-65k",
    ),
    (
        "gpt2-small-attn-out-v5-32k/blocks.9.hook_attn_out",
        "jbloom/GPT2-Small-OAI-v5-32k-attn-out-SAEs",
        "v5_32k_layer_9",
        None,
        "gpt2-small/9-att_32k-oai",
    ),
    (
        "gpt2-small-hook-z-kk/blocks.3.hook_z",
        "ckkissane/attn-saes-gpt2-small-all-layers",
        "gpt2-small_L3_Hcat_z_lr1.20e-03_l19.00e-01_ds24576_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9.pt",
        15.0,
        "gpt2-small/3-att-kk",
    ),
    (
        "llama_scope_lxa_32x/l18a_32x",
        "fnlp/Llama3_1-8B-Base-LXA-32x",
        "Llama3_1-8B-Base-L18A-32x",
        50.0,
        "llama3.1-8b/18-llamascope-att-131k",
    ),
    (
        "llama_scope_lxa_8x/l19a_8x",
        "fnlp/Llama3_1-8B-Base-LXA-8x",
        "Llama3_1-8B-Base-L19A-8x",
        50.0,
        "llama3.1-8b/19-llamascope-att-32k",
    ),
    (
        "llama_scope_lxm_32x/l16m_32x",
        "fnlp/Llama3_1-8B-Base-LXM-32x",
        "Llama3_1-8B-Base-L16M-32x",
        50.0,
        "llama3.1-8b/16-llamascope-mlp-131k",
    ),
    (
        "llama_scope_lxm_8x/l10m_8x",
        "fnlp/Llama3_1-8B-Base-LXM-8x",
        "Llama3_1-8B-Base-L10M-8x",
        50.0,
        "llama3.1-8b/10-llamascope-mlp-32k",
    ),
    (
        "llama_scope_lxr_32x/l7r_32x",
        "fnlp/Llama3_1-8B-Base-LXR-32x",
        "Llama3_1-8B-Base-L7R-32x",
        50.0,
        "llama3.1-8b/7-llamascope-res-131k",
    ),
]
NOT_IN_SAELENS = 149


def test_the_file_is_small():
    assert script.OUT.stat().st_size <= 100_000


@pytest.mark.parametrize(("name", "repo", "path", "l0", "neuronpedia"), SAMPLE, ids=[one[0] for one in SAMPLE])
def test_names_of_saelens_stand_for_the_same_files(name, repo, path, l0, neuronpedia):
    one = entry(name)
    assert (one.repo, one.path, one.neuronpedia) == (repo, path, neuronpedia)
    assert l0 is None or one.l0 == l0


def test_names_are_unique_and_facts_well_formed():
    assert len(NAMES) == len(EVERY) == 13_857 + NOT_IN_SAELENS
    formats = {plugin.name for plugin in registry.plugins("formats")}
    formats |= {"temporal"}  # refused, with a reason
    for one in EVERY:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", one.repo), one
        assert one.path == one.path.strip("/ "), one
        assert "{" not in "".join(map(str, one)), one
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", one.model) or one.model == "gpt2", one
        assert one.format in formats, one
        assert one.hook is None or re.fullmatch(r"blocks\.\d+\.(\w+\.)?hook_\w+|hook_embed", one.hook), one
        assert one.width is None or 500 < one.width < 2**21, one
        assert one.l0 is None or 1 < one.l0 < 2000, one
        assert one.neuronpedia is None or re.fullmatch(r"[\w.-]+/[\w.-]+", one.neuronpedia), one
    ids = Counter(one.neuronpedia for one in EVERY if one.neuronpedia)
    assert max(ids.values()) == 1


LAYERS = {"270m": 18, "1b": 26, "4b": 34, "12b": 48}  # of Gemma 3
EXPECTED = {  # the layers of a model times the kinds of dictionaries that the authors describe
    **{f"llama_scope_lx{site}_{times}x": 32 for site in ("r", "a", "m", "tc") for times in (8, 32)},
    **{"llama_scope_r1_distill": 32 * 3, "gpt2-small-res-jb": 12 + 1, "gpt2-small-hook-z-kk": 12, "gpt2-small-mlp-tm": 12},
    **{
        "gemma-scope-2b-pt-transcoders": 26,
        "gemma-scope-2b-pt-att-canonical": 26 * 2,
        "gemma-scope-9b-pt-mlp-canonical": 42 * 2,
    },
    **{f"gemma-scope-2-{m}-pt-{site}-all": n * 2 * 2 for m, n in LAYERS.items() for site in ("res", "att", "mlp")},
    **{f"gemma-scope-2-{m}-it-transcoders-all": n * 2 * 2 * 2 for m, n in LAYERS.items()},
    **{"qwen-scope-3-1.7b-base-w32k-l50": 28, "qwen-scope-3-8b-base-w64k-l100": 36, "mwhanna-qwen3-4b-transcoders": 36},
    **{"sae-pythia-70m-32k": 6 * 3, "skip-transcoder-Llama-3.2-1B-131k": 16, "mntss-transcoder-Llama-3.2-1B": 16},
}


@pytest.mark.parametrize(("release", "n"), EXPECTED.items())
def test_releases_have_a_dictionary_for_each_layer_and_kind(release, n):
    assert sum(one.release == release for one in EVERY) == n


def test_numbers_in_names_agree_with_the_facts():
    """Layer, width and L0 are in most names; the hook, the path and Neuronpedia's id must say the same."""
    n_compared = 0
    for one in EVERY:
        layer = re.search(r"(?:blocks\.|layers?[._]?|^l)(\d+)", one.id)
        if layer and one.hook and one.hook != "hook_embed":
            assert one.hook.startswith(f"blocks.{layer[1]}."), one
            n_compared += 1
        if match := re.search(r"width_(\d+)([km])", one.path):
            assert abs(math.log2(one.width / (int(match[1]) * {"k": 1e3, "m": 1e6}[match[2]]))) < 0.08, one
            assert one.width & (one.width - 1) == 0, one
        if match := re.search(r"average_l0_(\d+)", one.path):
            assert one.l0 == int(match[1]), one
        if one.neuronpedia and layer and (match := re.search(r"/(\d+)-", one.neuronpedia)):
            assert match[1] == layer[1] or one.name == "gpt2-small-res-jb/blocks.11.hook_resid_post", one
    assert n_compared > 13_000


def test_hooks_say_what_gemma_scope_reads_and_writes():
    hooks = {
        "gemma-scope-2b-pt-res-canonical/layer_3/width_16k/canonical": ("blocks.3.hook_resid_post", None),
        "gemma-scope-2b-pt-att-canonical/layer_3/width_16k/canonical": ("blocks.3.attn.hook_z", None),
        "gemma-scope-9b-pt-mlp-canonical/layer_3/width_16k/canonical": ("blocks.3.hook_mlp_out", None),
        "gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76": (
            "blocks.0.ln2.hook_normalized",
            "blocks.0.hook_mlp_out",
        ),
        "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6": ("hook_embed", None),
        "gemma-scope-2-1b-it-mlp-all/layer_25_width_16k_l0_small": ("blocks.25.hook_mlp_out", None),
        "gpt2-small-hook-z-kk/blocks.5.hook_z": ("blocks.5.attn.hook_z", None),
        "skip-transcoder-Llama-3.2-1B-131k/layers.5.mlp": ("blocks.5.mlp.hook_in", "blocks.5.mlp.hook_out"),
    }
    for name, ports in hooks.items():
        assert (NAMES[name].hook, NAMES[name].target) == ports


def test_an_entry_gives_its_address_and_what_reading_needs():
    one = NAMES["gpt2-small-res-jb/blocks.8.hook_resid_pre"]
    assert one.address == Address("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre", None)
    assert one.known.release == "gpt2-small-res-jb/blocks.8.hook_resid_pre"
    assert (one.known.model, one.known.processing) == ("gpt2", ("center_writing_weights",))
    assert (one.known.neuronpedia, one.width, one.l0, one.rule) == ("gpt2-small/8-res-jb", 24576, 60, "l1")
    one = NAMES["mistral-7b-res-wg/blocks.8.hook_resid_pre"]
    assert (one.known.model, one.known.token_norm) == ("mistralai/Mistral-7B-v0.1", "constant_norm")
    one = NAMES["qwen-scope-3.5-27b-w80k-l50/layer3"]
    assert (str(one.address), one.width) == ("hf://Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_50/layer3.sae.pt", 81920)


def test_every_entry_gives_facts_that_reading_accepts():
    for one in random.Random(0).sample(EVERY, 300):
        assert one.known.hook == one.hook
        assert one.known.kept["release"] == one.name


def test_entry_at_prefers_the_name_with_more_facts():
    one = entry_at("google/gemma-scope-2b-pt-att", "layer_0/width_16k/average_l0_104/")
    assert one.name == "gemma-scope-2b-pt-att-canonical/layer_0/width_16k/canonical"
    assert one.neuronpedia == "gemma-2-2b/0-gemmascope-att-16k"
    assert entry_at("google/gemma-scope-2b-pt-att", "layer_0/width_16k") is None
    assert entry_at("somebody/else", "layer_0") is None


def test_every_dictionary_is_the_one_at_its_place():
    for one in random.Random(1).sample(EVERY, 300):
        there = entry_at(one.repo, one.path)
        assert (there.repo, there.path) == (one.repo, one.path)


def test_unknown_names_are_told_apart():
    assert entry("my-run/dictionary") is None
    with pytest.raises(HubNotFoundError, match=r"no dictionary 'blocks.8.hook_resid_pr'; did you mean blocks.8.hook_resid_pre"):
        entry("gpt2-small-res-jb/blocks.8.hook_resid_pr")
    with pytest.raises(
        HubNotFoundError, match=r"has 13 dictionaries; name one of them; it has blocks.11.hook_resid_post, .* and 8 more"
    ):
        entry("gpt2-small-res-jb")


def test_rows_describe_products_and_aligned_values():
    assert list(_combinations(["layer=1-3 width=16k,65k l0@layer=5*2,7"])) == [
        {"layer": layer, "width": width, "l0": l0}
        for (layer, l0), width in product((("1", "5"), ("2", "5"), ("3", "7")), ("16k", "65k"))
    ]
    rows = ["a=0", "b=1:", "a=2", "a=3,4 c=5", "b=6 d=7:", "a=8"]
    assert list(_combinations(rows)) == [
        *({"a": "0"}, {"b": "1", "a": "2"}, {"b": "1", "a": "3", "c": "5"}),
        *({"b": "1", "a": "4", "c": "5"}, {"b": "6", "d": "7", "a": "8"}),
    ]
    assert list(_combinations([""])) == [{}]


def test_widths_are_powers_of_two():
    assert [width_of(text) for text in ["4k", "16k", "65k", "131k", "262k", "524k", "1m", "24576"]] == [
        *(1 << 12, 1 << 14, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 24576)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_script_describes_any_table_by_rows(seed):
    """Random sets of combinations, with a value that depends on two parts and one that depends on one."""
    random_ = random.Random(seed)
    every = list(product(map(str, range(8)), ("16k", "65k"), ("big", "small")))
    kept = random_.sample(every, random_.randint(1, len(every)))
    table = [
        {"layer": a, "width": b, "size": c, "l0": str(int(a) // 3 + len(c)), "version": str(int(a) % 2)} for a, b, c in kept
    ]
    rows = script.shortened(script.rows_of(table, ["layer", "width", "size"]), "id={layer}-{width} ")
    described = [values for values in _combinations(rows) if values.pop("id") == "{layer}-{width}"]
    assert sorted(map(sorted, (one.items() for one in described))) == sorted(map(sorted, (one.items() for one in table)))


def test_the_script_writes_what_the_registry_says(tmp_path, monkeypatch):
    saes = [
        {"id": f"blocks.{n}.hook_resid_pre", "path": f"v{n % 2}/layer_{n}", "l0": 10.5 + n, "neuronpedia": f"gpt2-small/{n}-x"}
        for n in range(4)
    ]
    registry = {"gpt2-small-x": {"repo_id": "me/x", "model": "gpt2-small", "conversion_func": None, "saes": saes}}
    tables = {release: script.table_of(release, value) for release, value in registry.items()}
    text = script.toml(script.merged(tables))
    assert text == script.toml(script.merged({release: script.table_of(release, value) for release, value in registry.items()}))
    monkeypatch.setattr("saelens_lite.releases._releases", lambda: script.index.parsed(text))
    script.index._expanded.cache_clear()
    script.check(registry)
    assert entry("gpt2-small-x/blocks.3.hook_resid_pre").hook == "blocks.3.hook_resid_pre"
    saes[2]["path"] = "elsewhere"
    with pytest.raises(SystemExit, match="elsewhere"):
        script.check(registry)
    script.index._expanded.cache_clear()


def brute_force(model, hook, width, l0) -> set[str]:
    """Return the names that meet the conditions, each checked by itself."""
    low, high = l0 if isinstance(l0, tuple) else (l0 / 2, l0 * 2)
    return {
        one.name
        for one in EVERY
        if model in one.model.lower()
        and hook in f"{one.hook} {one.target}"
        and one.width is not None
        and (one.width == width if isinstance(width, int) else width[0] <= one.width <= width[1])
        and one.l0 is not None
        and low <= one.l0 <= high
    }


@pytest.mark.parametrize("l0", [50, (40, 60)])
@pytest.mark.parametrize(
    ("model", "hook", "width"),
    [("gpt2", "resid", 24576), ("gemma-2-9b", "mlp", (1 << 14, 1 << 17)), ("qwen", "resid_post", 65536)],
)
def test_find_agrees_with_a_brute_force_search(model, hook, width, l0):
    matches = find(model=model, hook=hook, width=width, l0=l0)
    assert {one.name for one in matches} == brute_force(model, hook, width, l0)
    assert 0 < len(matches) < len(EVERY)
    if l0 == 50:
        ratios = [max(one.l0 / 50, 50 / one.l0) for one in matches]
        assert ratios == sorted(ratios)


def test_find_searches_words_and_releases():
    assert {one.release for one in find("gpt2-small JB splitting")} == {"gpt2-small-res-jb-feature-splitting"}
    assert {one.release for one in find(release="gpt2-small-res-jb")} == {"gpt2-small-res-jb"}
    assert len({one.release for one in find(release="gpt2-small-res")}) > 5
    assert len(find()) == len(EVERY)
    assert len(find("no such words")) == 0
    numbers = (0, -1, True, 10**400, math.nan, (5, 2), (5,), (1, 2, 3), ("a", "b"), [])
    for bad in (*numbers, "", "many", "1-2-3", "64-16", "-5", "1.5k"):
        with pytest.raises(ConfigError, match=r"l0 = .*; expected a positive number"):
            _bounds("l0", bad, 2.0)


@pytest.mark.parametrize("text", ["16k-65k", "16K-65K", "16384-65536", ["16k", 65536], (16384, "65k"), [16384, 65536]])
def test_ranges_can_be_texts_and_lists(text):
    wanted = find(model="gpt2", width=(16384, 65536))
    assert len(wanted) > 10
    assert find(model="gpt2", width=text) == wanted
    assert find(model="gpt2", width="24576") == find(model="gpt2", width=24576)


def test_the_repr_is_short_and_slices_are_results():
    matches = find(model="gpt2")
    assert repr(matches[:0]) == "PublicDictionaries(0)"
    assert repr(matches[1:2]) == f"PublicDictionaries(1: {matches[1].name})"
    assert repr(matches).startswith(f"PublicDictionaries({len(matches):,}: {matches[0].name}, ")
    assert len(repr(matches)) < 300
    assert isinstance(matches[:5], PublicDictionaries)
    assert matches[:5].to_frame()["name"].tolist() == [one.name for one in matches][:5]


def test_results_print_names_that_can_be_copied():
    matches = find(model="gpt2", hook="resid_pre", width=24576, l0=(59, 61))
    assert "gpt2-small-res-jb/blocks.8.hook_resid_pre" in str(matches)
    assert "gpt2-small/8-res-jb" in matches._repr_html_()
    assert matches.to_frame()["name"].tolist() == ["gpt2-small-res-jb/blocks.8.hook_resid_pre"]
    assert "gemma-scope-2b-pt-res-canonical" in str(find(model="gemma-2-2b"))
    assert "13,857" in str(PublicDictionaries(EVERY[:13_857]))
    assert "no public dictionary" in str(find("no such words"))


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_find_online_adds_tagged_repositories(tmp_path, monkeypatch):
    with running_hub() as hub:
        hub.accounts = {TOKEN: Account("me")}
        connect(hub, tmp_path, monkeypatch)
        hub.labels = {
            "me/gpt2-saes": ("saelens", "base_model:openai-community/gpt2", "license:mit"),
            "me/transcoders": ("sparsify", "license:\x1b[31mred"),
            "me/gpt2-other": ("transformers",),
            "jbloom/GPT2-Small-SAEs-Reformatted": ("saelens",),
            "../gpt2": ("saelens",),
        }
        matches = find("gpt2", hook="resid", l0=50, online=True)
        online = [one for one in matches if one not in EVERY]
        facts = {"model": "openai-community/gpt2", "license": "mit"}
        assert online == [Entry(release="", id="", repo="me/gpt2-saes", path="", format="saelens", **facts)]
        assert online[0].name == "hf://me/gpt2-saes"
        assert len(matches) == len(find("gpt2", hook="resid", l0=50)) + 1
        assert [(one.format, one.license) for one in find("me/transcoders", online=True)] == [("sparsify", None)]
        hub.order(Fault("GET", "/api/models", "status", times=99, status=503))
        with pytest.raises(HubUnreachableError, match="repositories tagged saelens"):
            find("gpt2", online=True)
        close_session()


def run(*arguments: str) -> subprocess.CompletedProcess:
    code = (
        "import sys\nfrom saelens_lite.cli import main\n"
        f"sys.argv = {['saelens-lite', *arguments]!r}\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_command_finds_without_torch():
    done = run("find", "gpt2", "jb", "--hook", "resid", "--width", "16k-32k", "--l0", "59-61", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [one["name"] for one in facts] == ["gpt2-small-res-jb/blocks.8.hook_resid_pre"]
    assert facts[0]["model"] == "gpt2"
    assert facts[0]["repo"] == "jbloom/GPT2-Small-SAEs-Reformatted"


def test_the_command_explains_a_bad_range():
    done = run("find", "--l0", "many")
    assert done.returncode != 0
    assert "--l0 many; expected a positive number" in done.stderr


def test_the_releases_are_listed():
    assert len(releases()) == len({one.release for one in EVERY}) == 179
    assert FILE.endswith(".toml")


def test_the_names_of_the_guide_are_in_the_index():
    from saelens_lite import hub

    names = re.findall(r"^\| `([^`…]+)` \|", hub.__doc__, re.MULTILINE)
    assert len(names) == 15
    assert all(entry(name) for name in names)
