"""Write the index of public dictionaries, saelens_lite/data/releases.toml, from public facts.

Two sources: the registry file of SAELens (names, repositories, paths, L0 and Neuronpedia ids), and `OTHERS` below, releases
that the registry does not have. Facts that neither states for each dictionary (hooks, Hub ids of models, rules, licences) are
in `FAMILIES` and `facts_of`. `saelens_lite/releases.py` explains the file. The same registry gives the same bytes.

    pip download sae-lens==6.54.12 --no-deps && unzip -o sae_lens-*.whl sae_lens/pretrained_saes.yaml
    python scripts/releases.py sae_lens/pretrained_saes.yaml

The script ends with an error if a dictionary of the registry would get another repository, path, L0 or Neuronpedia id; but the
registry gives some dictionaries the Neuronpedia id of another one, and these get none.
"""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

import saelens_lite.releases as index

OUT = Path(index.__file__).parent / index.FILE
HEAD = "# Public dictionaries; saelens_lite/releases.py explains the form. Written by scripts/releases.py.\n"
# Parts of ids, paths and Neuronpedia ids that differ within a release. The group of each pattern names the part.
PARTS = [
    *(r"blocks\.(?P<layer>\d+)\.", r"(?<![a-z])layer_?(?P<layer>\d+)", r"^l(?P<layer>\d+)[arm]_", r"/L(?P<layer>\d+)R$"),
    *(r"Base-L(?P<layer>\d+)[ARM]-", r"_L(?P<layer>\d+)_H", r"/(?P<layer>\d+)-", r"^(?P<layer>\d+)(?:-|$)"),
    *(r"width_(?P<width>\d+[km])", r"hook_resid_pre_(?P<width>\d+)", r"res_fs(?P<width>\d+)-", r"_ds(?P<width>\d+)_"),
    *(r"res-(?P<width>\d+k)__", r"-(?P<width>\d+[km])(?=$|__l0)", r"average_l0_(?P<l0>\d+)", r"__l0-(?P<l0>\d+)"),
    *(r"_l0_(?P<size>small|medium|big)", r"trainer_(?P<trainer>\d+)", r"step_(?P<step>\d+)", r":v(?P<version>\d+)$"),
    *(r"_l1(?P<penalty>[\d.]+e[+-]\d+)_", r"_dc(?P<decay>[\d.]+e[+-]\d+)_", r"_v(?P<version>\d+)\.pt$"),
]
MODELS = {
    "gpt2-small": "gpt2",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
    **{
        name: f"google/{name}"
        for name in ("gemma-2b", "gemma-2b-it", "gemma-2-2b", "gemma-2-9b", "gemma-2-9b-it", "gemma-2-27b")
    },
    **{f"qwen3-{size}b": f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14")},
}
RESID = "blocks.{layer}.hook_resid_post"
GEMMA = {"format": "gemma_scope", "rule": "jumprelu", "license": "CC-BY-4.0", "prepend_bos": True, "n_ctx": 1024}
# Facts about the releases that one function of SAELens reads. Hooks: a transcoder reads the input of the MLP; that of Gemma
# Scope's first release before the norm's weight. The notebook of deepseek_r1's authors reads the input of its layer.
FAMILIES: dict[str | None, dict[str, Any]] = {
    None: {"format": "saelens"},
    "connor_rob_hook_z": {
        "format": "hook_z",
        "rule": "l1",
        "hook": "blocks.{layer}.attn.hook_z",
        "prepend_bos": True,
        "n_ctx": 128,
    },
    "gemma_2": GEMMA,
    "gemma_2_transcoder": GEMMA | {"hook": "blocks.{layer}.ln2.hook_normalized", "target": "blocks.{layer}.hook_mlp_out"},
    "gemma_3": GEMMA,
    "llama_scope": {"format": "llamascopium", "rule": "jumprelu", "license": "Apache-2.0"},
    "llama_scope_r1_distill": {"format": "llamascopium", "rule": "jumprelu", "hook": RESID, "width": 32768},
    "dictionary_learning_1": {"format": "dictionary_learning", "hook": RESID},
    "mwhanna_transcoder": {
        **{"format": "circuit_tracer", "rule": "l1"},
        **{"hook": "blocks.{layer}.mlp.hook_in", "target": "blocks.{layer}.mlp.hook_out"},
    },
    "mntss_clt_layer_transcoder": {"format": "circuit_tracer"},
    "goodfire": {"format": "goodfire", "rule": "l1", "hook": RESID, "width": 65536},
    "deepseek_r1": {"format": "deepseek_r1", "rule": "l1", "hook": "blocks.{layer}.hook_resid_pre", "width": 65536},
    "qwen_scope": {"format": "qwen_scope", "rule": "topk", "hook": RESID},
    "temporal": {"format": "temporal", "hook": RESID},
}
SITES = {  # of Gemma Scope, by the end of the repository's name and by the folder of a path
    **{"res": RESID, "att": "blocks.{layer}.attn.hook_z", "mlp": "blocks.{layer}.hook_mlp_out"},
    **{"resid_post": RESID, "attn_out": "blocks.{layer}.attn.hook_z", "mlp_out": "blocks.{layer}.hook_mlp_out"},
}
L1, JUMP, TOPK, BATCH, MATRYOSHKA = ({"rule": rule} for rule in ("l1", "jumprelu", "topk", "batch_topk", "matryoshka"))
CENTRED = {"processing": ["center_writing_weights"]}
# Facts about single releases, by the beginning of their names ($ is the end); all that fit are used.
RELEASES: dict[str, dict[str, Any]] = {
    "gpt2-small-res-jb$": {"width": 24576},
    "gpt2-small-res-jb": L1,
    "gpt2-small-mlp-tm": L1 | {"width": 24576},
    "gpt2-small-res_s": L1,
    "mistral-7b-res-wg": L1 | {"width": 65536, "token_norm": "constant_norm"},
    "pythia-70m-deduped-": L1 | {"width": 32768},
    "gemma-2b-": L1 | {"width": 16384},
    "gemma-2-2b-res-": JUMP | {"width": 32768},
    "gemma-2-9b-res-": JUMP | {"width": 32768},
    "gemma-3-1b-res-": JUMP | {"width": 32768},
    "sae_bench_gemma-2-2b_topk": TOPK,
    "sae_bench_gemma-2-2b_vanilla": L1,
    "sae_bench_pythia70m_sweep_gated": {"rule": "gated"},
    "sae_bench_pythia70m_sweep_panneal": L1,
    "sae_bench_pythia70m_sweep_standard": L1,
    "sae_bench_pythia70m_sweep_topk": TOPK,
    "saebench_gemma-2-2b": MATRYOSHKA,
    "llama-3.1-8b-instruct-andyrdt": BATCH | {"width": 131072},
    "qwen2.5-7b-instruct-andyrdt": BATCH,
    "gpt-oss-20b-andyrdt": BATCH,
    "gemma-scope-9b-it-res": {"model": "google/gemma-2-9b-it"},
}
PYTHIA, LLAMA_3, LLAMA_32 = "EleutherAI/pythia-70m", "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.2-1B"
# Releases that the registry does not have. The id of a dictionary that fills a whole repository is its kind.
OTHERS: dict[str, dict[str, Any]] = {
    "sae-pythia-70m-32k": {
        **{"repo": "EleutherAI/sae-pythia-70m-32k", "format": "sparsify", "model": PYTHIA, "rule": "topk"},
        **{"width": 32768, "l0": 16, "path": "{id}"},
        "rows": [
            f"id=layers.{{layer}} hook={RESID} layer=0-5",
            "id=layers.{layer}.attention hook=blocks.{layer}.attn.hook_out layer=0-5",
            "id=layers.{layer}.mlp hook=blocks.{layer}.mlp.hook_out layer=0-5",
        ],
    },
    "sae-llama-3-8b-32x": {
        **{"repo": "EleutherAI/sae-llama-3-8b-32x", "format": "sparsify", "model": LLAMA_3, "rule": "topk"},
        **{"width": 131072, "l0": 192, "path": "{id}"},
        "rows": ["id=embed_tokens hook=hook_embed", f"id=layers.{{layer}} hook={RESID} layer=0-30"],
    },
    "skip-transcoder-Llama-3.2-1B-131k": {
        **{"repo": "EleutherAI/skip-transcoder-Llama-3.2-1B-131k", "format": "sparsify", "model": LLAMA_32, "rule": "topk"},
        **{"hook": "blocks.{layer}.mlp.hook_in", "target": "blocks.{layer}.mlp.hook_out", "width": 131072, "l0": 32},
        **{"path": "{id}", "rows": ["id=layers.{layer}.mlp layer=0-15"]},
    },
    **{
        f"llama_scope_lxtc_{times}x": {
            **{"repo": f"fnlp/Llama3_1-8B-Base-LXTC-{times}x", "format": "llamascopium", "model": "meta-llama/Llama-3.1-8B"},
            **{"rule": "jumprelu", "license": "Apache-2.0", "width": 4096 * times},
            **{"hook": "blocks.{layer}.ln2.hook_normalized", "target": "blocks.{layer}.hook_mlp_out"},
            **{"id": f"l{{layer}}tc_{times}x", "path": f"Llama3_1-8B-Base-L{{layer}}TC-{times}x", "rows": ["layer=0-31"]},
        }
        for times in (8, 32)
    },
    "mntss-transcoder-Llama-3.2-1B": {
        **{"repo": "mntss/transcoder-Llama-3.2-1B", "format": "circuit_tracer", "model": LLAMA_32},
        **{"hook": "blocks.{layer}.mlp.hook_in", "target": "blocks.{layer}.mlp.hook_out"},
        **{"id": "layer_{layer}", "path": "{id}.safetensors", "rows": ["layer=0-15"]},
    },
    **{
        f"mntss-{repo}": {
            **{"repo": f"mntss/{repo}", "format": "circuit_tracer", "model": model},
            **{"id": "clt", "path": "", "rows": [""]},
        }
        for repo, model in (
            ("clt-gemma-2-2b-426k", "google/gemma-2-2b"),
            ("clt-gemma-2-2b-2.5M", "google/gemma-2-2b"),
            ("clt-llama-3.2-1b-524k", LLAMA_32),
        )
    },
}
NEURONPEDIA_OF_OTHERS = {  # dictionaries for which the registry has the Neuronpedia id of another one
    "gemma-scope-9b-pt-res/layer_2/width_16k/average_l0_8",
    "gemma-scope-9b-pt-res/layer_20/width_131k/average_l0_114",
    "pythia-70m-deduped-res-sm/blocks.0.hook_resid_pre",
}

Row = dict[str, str]


def facts_of(release: str, value: dict[str, Any]) -> dict[str, Any]:
    """Return the facts that all dictionaries of a release share."""
    facts: dict[str, Any] = {"repo": value["repo_id"], "model": MODELS.get(value["model"], value["model"])}
    facts |= FAMILIES[value["conversion_func"]]
    repo, first = value["repo_id"], str(value["saes"][0]["path"])
    if value["conversion_func"] == "gemma_2":
        facts["hook"] = SITES[repo.rpartition("-")[2]]
    if value["conversion_func"] == "gemma_3":
        site = first.partition("/")[0].removesuffix("_all")
        transcoder = {"hook": "blocks.{layer}.mlp.hook_in", "target": "blocks.{layer}.hook_mlp_out"}
        facts |= transcoder if site == "transcoder" else {"hook": SITES[site]}
    if match := re.search(r"-LX([ARM])-(\d+)x", repo):
        facts["hook"] = "blocks.{layer}." + {"A": "hook_attn_out", "R": "hook_resid_post", "M": "hook_mlp_out"}[match[1]]
        facts["width"] = 4096 * int(match[2])
    if match := re.search(r"-W(\d+)K-", repo):
        facts["width"] = 1024 * int(match[1])
    if match := re.search(r"^Qwen/.*-L0_(\d+)$", repo):
        facts["k"] = int(match[1])
    if match := re.search(r"width-2pow(\d+)_", release):
        facts["width"] = 2 ** int(match[1])
    if match := re.search(r"-v5-(32|128)k", release):
        facts["width"] = 1024 * int(match[1])
    overrides = value.get("config_overrides") or {}
    if (overrides.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        facts |= CENTRED
    for beginning, more in RELEASES.items():
        facts |= more if f"{release}$".startswith(beginning) else {}
    return facts


def _in_order(sae: dict[str, Any]) -> list[Any]:
    """Return a key that sorts numbers in ids as numbers."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d+)", sae["id"]) if part]


def template(text: str, parts: Row) -> str:
    """Return a text with its parts replaced by their names in braces. New parts are added to `parts`."""
    spans: dict[tuple[int, int], str] = {}
    for pattern in PARTS:
        for match in re.finditer(pattern, text):
            (name, value), place = next(iter(match.groupdict().items())), match.span(1)
            if parts.setdefault(name, value) == value and not any(a < place[1] and place[0] < b for a, b in spans):
                spans[place] = name
    for (start, stop), name in sorted(spans.items(), reverse=True):
        text = f"{text[:start]}{{{name}}}{text[stop:]}"
    return text


def number(value: float) -> str:
    """Return a number without a needless fraction."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def described(sae: dict[str, Any], family: str | None, facts: dict[str, Any]) -> tuple[Row, Row, list[str]]:
    """Return the templates of a dictionary, the values of their parts, and which parts its id contains."""
    parts: Row = {}
    id, path = template(sae["id"], parts), str(sae["path"])
    own = list(parts)
    templates = {"id": id, "path": template(path, parts)}
    if "l0" in sae:
        parts.setdefault("l0", number(sae["l0"]))  # one that the path states is right
    templates["path"] = templates["path"].replace(id, "{id}")
    if "neuronpedia" in sae:
        templates["neuronpedia"] = template(sae["neuronpedia"], parts)
    if "norm_scaling_factor" in sae and family not in ("temporal", "llama_scope"):  # Llama Scope's files state it
        parts["scale"] = number(sae["norm_scaling_factor"])
    if family is None:
        hook = re.sub(r"_\{width\}$", "", id)
        templates["hook"] = "{id}" if hook == id else hook
    if "embedding" in path:
        templates["hook"] = "hook_embed"
    if "width" in facts:
        parts.pop("width", None) if all("{width}" not in text for text in templates.values()) else None
    return templates, parts, own


def rows_of(entries: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Return rows that describe values of parts: products where they are, split where they are not."""
    values = {name: list(dict.fromkeys(entry[name] for entry in entries)) for name in names}
    values = {name: sorted(v, key=int) if all(x.isdecimal() for x in v) else v for name, v in values.items()}
    others = [name for name in entries[0] if name not in names]
    row = " ".join(f"{name}={listed(v)}" for name, v in values.items())
    if len(entries) == len(set(map(str, entries))) == len(list(product(*values.values()))):
        columns = [_dependent(entries, values, other) for other in others]
        if all(columns):
            return [" ".join([row, *filter(None, columns)]).strip()]
    splits = [_split(entries, names, name) for name, v in values.items() if len(v) > 1]
    return min(splits, key=lambda rows: sum(map(len, rows)) + 8 * len(rows))


def _dependent(entries: Sequence[Row], values: dict[str, list[str]], other: str) -> str:
    """Return the column of a part that is the same everywhere or depends on one other part, or an empty text."""
    if len({entry[other] for entry in entries}) == 1:
        return f"{other}={entries[0][other]}"
    for name, order in values.items():
        seen = {(entry[name], entry[other]) for entry in entries}
        if len(seen) == len(order):
            by = dict(seen)
            return f"{other}@{name}={listed([by[value] for value in order])}"
    return ""


def _split(entries: Sequence[Row], names: Sequence[str], name: str) -> list[str]:
    """Return the rows of entries that are split by the values of one part. Values with the same rows share them."""
    alike: dict[str, list[Row]] = {}
    for value in dict.fromkeys(entry[name] for entry in entries):
        own = [entry for entry in entries if entry[name] == value]
        rest = json.dumps(sorted([sorted((k, v) for k, v in entry.items() if k != name) for entry in own]))
        alike.setdefault(rest, []).extend(own)
    rows = []
    for own in alike.values():
        rows += rows_of(own, names) if len(alike) > 1 else ["?" * 100_000]
    return rows


def listed(values: Sequence[str]) -> str:
    """Return values separated by commas, with ranges as 1-3 and repeated values as 5*3."""
    parts, at = [], 0
    while at < len(values):
        same = next((n for n in range(at, len(values)) if values[n] != values[at]), len(values)) - at
        run = 1
        while values[at].isdecimal() and at + run < len(values) and values[at + run] == str(int(values[at]) + run):
            run += 1
        length = max(same, run) if max(same, run) > 2 else 1
        parts.append(
            values[at] if length == 1 else f"{values[at]}*{same}" if same > run else f"{values[at]}-{values[at + run - 1]}"
        )
        at += length
    return ",".join(parts)


def shortened(rows: Sequence[str], before: str) -> list[str]:
    """Return rows under common beginnings (`before`, and a column that many of them share) where that is shorter."""
    flat = [f"{before}{row}".strip() for row in rows]
    choices = [flat]
    for name in ("", *(column.partition("=")[0] for column in rows[0].split())):
        heads: dict[str, list[str]] = {}
        for row in rows:
            own = next((column for column in row.split() if column.startswith(f"{name}=")), "")
            rest = " ".join(column for column in row.split() if column != own)
            heads.setdefault(f"{before}{own}".strip(), []).append(rest)
        if "" not in heads and all(all(part) for part in heads.values()):
            choices.append([line for head, part in heads.items() for line in (f"{head}:", *part)])
    return min(choices, key=lambda lines: sum(map(len, lines)) + 7 * len(lines))


def table_of(release: str, value: dict[str, Any]) -> dict[str, Any]:
    """Return the table of a release of the registry."""
    facts = facts_of(release, value)
    groups: dict[str, tuple[Row, list[str], list[Row]]] = {}
    for listed_so in sorted(value["saes"], key=_in_order):
        wrong = {"neuronpedia"} if f"{release}/{listed_so['id']}" in NEURONPEDIA_OF_OTHERS else set()
        sae = {key: fact for key, fact in listed_so.items() if key not in wrong}
        templates, parts, own = described(sae, value["conversion_func"], facts)
        key = json.dumps([templates, sorted(parts)])
        groups.setdefault(key, (templates, own, []))[2].append(parts)
    shared = {k: v for k, v in next(iter(groups.values()))[0].items() if all(g[0].get(k) == v for g in groups.values())}
    rows: list[str] = []
    for templates, own, entries in groups.values():
        before = "".join(f"{k}={v} " for k, v in templates.items() if k not in shared)
        group = shortened(rows_of(entries, own), before)
        rows = [*group, *rows] if ":" not in group[0][-1:] else [*rows, *group]  # rows without a beginning come first
    return facts | shared | {"rows": rows}


GEMMA_2 = re.compile(r"(gemma-scope-2-\w+-)(?P<tune>pt|it)-(?P<site>res|att|mlp|transcoders)(-all)?")


def merged(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return tables in which those of Gemma Scope 2 that differ in the model's tuning or the site only are one."""
    alike: dict[str, list[tuple[str, Row]]] = {}
    for release, table in tables.items():
        if match := GEMMA_2.fullmatch(release):
            name, common, parts = _general(match, table)
            alike.setdefault(json.dumps([name, common]), []).append((release, parts))
    done: dict[str, dict[str, Any]] = {}
    for key, members in alike.items():
        (name, common), parts = json.loads(key), [parts for _, parts in members]
        where = rows_of(parts, [part for part in ("tune", "site") if part in parts[0]])
        alone = len(members) == 1 or name in done
        done |= {release: tables[release] for release, _ in members} if alone else {name: {"where": where} | common}
    return {r: table for r, table in tables.items() if not GEMMA_2.fullmatch(r)} | done


def _general(match: re.Match[str], table: dict[str, Any]) -> tuple[str, dict[str, Any], Row]:
    """Return name and table of a release of Gemma Scope 2 with braces for the tuning and the site, and their values."""
    start, tune, site, end = match.groups(default="")
    common = {
        key: re.sub(rf"-{tune}$", "-{tune}", value) if key in ("repo", "model") else value for key, value in table.items()
    }
    if site == "transcoders":
        return f"{start}{{tune}}-{site}{end}", common, {"tune": tune}
    folder, _, path = table["path"].partition("/")
    place = table["hook"].removeprefix("blocks.{layer}.")
    common |= {"path": f"{{folder}}/{path}", "hook": "blocks.{layer}.{place}"}
    return f"{start}{{tune}}-{{site}}{end}", common, {"tune": tune, "site": site, "folder": folder, "place": place}


def toml(tables: dict[str, dict[str, Any]]) -> str:
    """Return the tables as TOML, one row a line."""
    lines = [HEAD]
    for release, table in tables.items():
        lines.append(f"[{json.dumps(release)}]")
        for key, value in table.items():
            rows = "".join(f"  {json.dumps(row)},\n" for row in value) if key == "rows" else ""
            lines.append(f"{key} = [\n{rows}]" if rows else f"{key} = {json.dumps(value)}")
        lines.append("")
    return "\n".join(lines)


def check(registry: dict[str, Any]) -> None:
    """Raise SystemExit if the index describes a dictionary of the registry otherwise than the registry."""
    for release, value in registry.items():
        for sae in value["saes"]:
            one = index.entry(f"{release}/{sae['id']}")
            assert one is not None
            neuronpedia = None if one.name in NEURONPEDIA_OF_OTHERS else sae.get("neuronpedia")
            expected = (value["repo_id"], str(sae["path"]), neuronpedia)
            stated = re.search(r"average_l0_(\d+)", one.path)
            l0 = float(stated[1]) if stated else sae.get("l0")
            if (one.repo, one.path, one.neuronpedia, one.l0) != (*expected, l0):
                raise SystemExit(f"{one} is not {expected}, {l0}")


def main(arguments: Iterable[str] | None = None) -> None:
    """Write the index and check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("registry", type=Path, help="pretrained_saes.yaml of SAELens's distribution")
    registry = yaml.load(parser.parse_args(arguments).registry.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    tables = {release: table_of(release, value) for release, value in sorted(registry.items())} | OTHERS
    OUT.write_text(toml(merged(tables)), encoding="utf-8")
    check(registry)
    n = sum(1 for _ in index.entries())
    print(f"{OUT}: {len(tables)} releases, {n:,} dictionaries, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
