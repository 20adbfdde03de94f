"""What hook names mean, in every family that transformer-lens knows and transformers builds small, against plain torch hooks."""

import importlib.util
from pathlib import Path

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import HookError

SCRIPT = Path(__file__).parents[1] / "scripts/hook_identities.py"
CHECKS = ("embed", "mid", "post", "hidden")
HALF = "1 holds, 1 refused"  # the other layer is dense
ALL_HOLD = """
Apertus Arcee BitNet Bloom Ernie4_5 Exaone4 GPT2LMHeadModel GPTBigCode GPTNeo Gemma2 Gemma3 Gemma Glm4 Glm Granite HunYuanDenseV1
Jais2 Lfm2 Llama Ministral3 Mistral ModernBertDecoder Mpt Nemotron OPT Olmo2 Olmo3 Olmo Phi3 Qwen2 Qwen3 SeedOss SmolLM3 StableLm
Starcoder2 VaultGemma Youtu GPTNeoX,sequential Falcon,sequential
"""
OTHERS = {  # the outcomes of each check, · where it holds
    "· none · ·": """Bamba CodeGen Cohere2 Cohere Falcon GPTJ GPTNeoX Phi Qwen3_5 Falcon,two,norms StableLm,parallel""",  # parallel
    "· refused · ·": "BertForMaskedLM BertLMHeadModel RobertaForMaskedLM OpenAIGPTLMHeadModel FalconH1 OPT,norms,behind "
    "Bloom,stream,behind,the,norm",
    "refused · · ·": "NanoChat XGLM OPT,projected,norms,before",
    "refused refused · ·": "OPT,projected",
    "· · refused ·": "Gemma4",
    "· · · refused": "FlexOlmo GptOss GraniteMoe JetMoe Llama4 MiniMaxM2 Mixtral Olmoe Qwen2Moe Qwen3Moe",
}
