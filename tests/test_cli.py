"""The command line: every verb once, and one-line errors with the right exit code."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import saelens_lite as sl
from saelens_lite import cli
from saelens_lite.config import ModelFacts

HOOK = "blocks.1.hook_resid_pre"


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "saelens_lite.cli", *map(str, args)], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a text, a cache and a trained dictionary, all made by commands."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "book.txt").write_text("It was the best of times, it was the worst of times. " * 200)
    capture = ("capture", folder / "book.txt", "--hooks", HOOK, "--out", folder / "cache", "--n-tokens", 2000)
    train = (
        "train", folder / "cache", "--sparsity", "topk", "--options.k", 8, "--d-sae", 64,
        "--n-tokens", 4000, "--batch-size", 256, "--out", folder / "run",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for args in (capture, train):
            patch.setattr(sys, "argv", ["saelens-lite", *map(str, args)])
            cli.main()
    return folder


def test_capture_and_train_leave_what_they_say(work):
    config = json.loads((work / "run/dictionary/cfg.json").read_text())
    assert (config["architecture"], config["k"], config["d_sae"]) == ("topk", 8, 64)
    assert config["metadata"]["hook_name"] == HOOK
    assert load_file(work / "run/dictionary/sae_weights.safetensors")["W_dec"].shape == (64, config["d_in"])
    assert [json.loads(line)["tokens"] for line in (work / "run/log.jsonl").read_text().splitlines()] == [4096]


def test_eval_writes_json(work, command):
    code, out, err = command(
        "eval",
        work / "run",  # stands for its dictionary
        "--text",
        work / "book.txt",
        "--n-tokens",
        1500,
        "--json",
        work / "e.json",
    )
    assert code == 0, err
    assert "ce_loss_score" in out
    (report,) = json.loads((work / "e.json").read_text()).values()
    assert report["n_tokens"] == 1500
    assert report["metrics"]["l0"]["value"] <= 8
    assert report["text"] == "book.txt"
    assert report["disjoint"] is None
    assert "the same source" in report["disjoint_why"]
    assert json.loads((work / "run/dictionary/eval.json").read_text()) == report


def test_eval_shows_controls_and_positions(work, command):
    folder = shutil.copytree(work / "run/dictionary", work / "x[" / "b]")  # rich's closing tag of nothing
    code, out, err = command("eval", folder, "--n-tokens", 600, "--controls", "--by-position")
    assert code == 0, err
    assert all(word in out for word in ("random", "PCA", "shuffled", "position", "2 – 3"))
    report = json.loads((folder / "eval.json").read_text())
    assert set(report["controls"]) == {"random", "PCA", "10 % permuted", "shuffled weights"}
    assert report["disjoint"] is None


def test_eval_of_two_models_takes_those_of_the_dictionary_or_those_given(lm, tmp_path, command):
    ports = [sl.Port(hook=HOOK, width=lm.d_model, model=name) for name in ("base", "chat")]
    facts = [ModelFacts(name=name, model="tiny") for name in ("base", "chat")]
    d = sl.Dictionary.create("topk", reads=ports, d_sae=64, options={"k": 8}, origin=sl.Origin(models=facts))
    folder = d.save(tmp_path / "d")
    shared = ("eval", folder, "--n-tokens", 300)
    code, out, err = command(*shared)
    assert code == 0, err
    report = json.loads((folder / "eval.json").read_text())
    assert list(report["by_port"]) == [port.key for port in ports]
    score = report["by_model"]["chat"]["ce_loss_score"]["value"]
    assert "at base" in out
    assert f"{score:.2f}" in out
    code, _, err = command(*shared, "--model", "base=tiny", "--model", "chat=tiny", "--json", tmp_path / "again.json")
    assert code == 0, err
    assert json.loads((tmp_path / "again.json").read_text())[str(folder)] == report
    for given, message in ((["base=tiny"], "there is no model 'chat'"), (["tiny"], "belongs to several models")):
        code, _, err = command(*shared, *(token for model in given for token in ("--model", model)))
        assert (code, message in err) == (2, True), err
    code, _, err = command(*shared, "--by-position")
    assert code == 2
    assert "leave out --by-position" in err


def test_features_writes_one_page(work, command):
    html = work / "features.html"
    code, out, err = command("features", work / "run/dictionary", "--text", work / "book.txt", "--html", html)
    assert code == 0, err
    assert "64 latents" in out
    assert html.read_text().lower().startswith("<!doctype html>")
    code, _, err = command("features", work / "run/dictionary", "--text", work / "book.txt", "--html", html)
    assert code == 2
    assert "already exists" in err


def test_features_of_several_are_kept_and_shown_again(work, command):
    d, html, out = work / "run/dictionary", work / "both.html", work / "stores"
    asked = ("features", d, d, "--text", work / "book.txt", "--html", html, "--out", out, "--codes", "--control")
    asked = (*asked, "--top-n", 3, "--window", 4, 2)
    code, printed, err = command(*asked)
    assert code == 0, err
    assert printed.count("64 latents") == 2
    assert sorted(path.name for path in out.iterdir()) == ["0-topk", "1-topk"]
    assert {"codes.parquet", "control.safetensors"} <= {path.name for path in (out / "1-topk").iterdir()}
    info = sl.FeatureStore.load(out / "1-topk").info
    assert (info.top_n, info.window, info.n_random) == (3, (4, 2), 10)
    pages = [work / "both-0-topk.html", work / "both-1-topk.html"]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    code, _, err = command("dashboard", out / "0-topk", "--html", html)
    assert code == 0, err
    assert html.read_bytes() == pages[0].read_bytes()
    code, _, err = command("dashboard", out, "--html", work / "other.html")
    assert code == 2
    assert "features.json is missing" in err


def test_train_reads_toml_and_flags_win(work, command):
    (work / "run.toml").write_text(
        'd_sae = 32\nn_tokens = 512\nbatch_size = 256\n\n[[dictionary]]\nsparsity = "l1"\noptions = {coefficient = 1.0}\n\n'
        '[[dictionary]]\nsparsity = "topk"\noptions = {k = 4}\n'
    )
    code, out, err = command("train", work / "cache", "--config", work / "run.toml", "--d-sae", 48, "--out", work / "two")
    assert code == 0, err
    assert out.count("train FVU") == 2
    for name, k in (("0-l1", None), ("1-topk", 4)):
        config = json.loads((work / "two" / name / "dictionary/cfg.json").read_text())
        assert config["d_sae"] == 48
        assert config.get("k") == k


def test_inspect(work, command):
    code, out, _ = command("inspect", work / "run")
    assert code == 0
    assert json.loads(out)["metadata"]["saelens_lite"]["sparsity"] == "topk"
    code, out, _ = command("inspect", work / "cache")
    assert code == 0
    assert json.loads(out)["activations"] == 2000


def test_compare_prints_figures_and_leaves_scores(work, command):
    d = work / "run/dictionary"
    again = shutil.copytree(d, work / "again")
    args = ("compare", d, d, again, "--include-dead", "--out", work / "scores", "--json", work / "compare.json")
    code, out, err = command(*args)
    assert code == 0, err
    assert "shared with all 2: 100.0%, with none: 0.0%" in out
    assert load_file(work / "scores/stability.safetensors")["n_shared"].tolist() == [2] * 64
    found = json.loads((work / "compare.json").read_text())
    assert list(found) == [str(d), str(again)]
    for figures in found.values():
        assert figures["summary"]["shared"] == 1 > figures["chance"]["shared"]
    code, _, err = command(*args)
    assert code == 2
    assert "already exists" in err


def test_probe_prints_a_table(work, command):
    lines = [f"It was the {'best' if i % 2 else 'worst'} of {i} times,{i % 2}" for i in range(24)]
    (work / "kinds.csv").write_text("\n".join(["sentence,label", *lines]))
    args = ("probe", work / "run/dictionary", "--data", work / "kinds.csv", "--ks", 2, "--json", work / "probe.json")
    code, out, err = command(*args, "--column", "sentence")
    assert code == 0, err
    assert "k = 2" in out
    assert "majority" in out
    (report,) = json.loads((work / "probe.json").read_text()).values()
    assert (report["n_train"], report["n_test"], report["classes"]) == (18, 6, ["0", "1"])
    assert len(report["probes"]["k = 2"]["latents"]) == 2
    code, _, err = command(*args)
    assert code == 2
    assert "no 'text'" in err


def test_steer_shows_both_texts(work, command):
    args = ("steer", work / "run/dictionary", "--prompt", "It was", "--max-new-tokens", 8, "--seed", 3, "--temperature", 1)
    edits = ("--clamp", "7=80.0", "--clamp", "8=-2", "--add", "3=20", "--ablate", 5, "--ablate", 6, "--scale", "9=0.5")
    code, out, err = command(*args, *edits)
    assert code == 0, err
    assert "plain" in out
    assert "nats per token" in out
    assert out.count("It was") == 2
    code, again, _ = command(*args, "--add", "3=0")
    plain, edited = next(line for line in again.splitlines() if "It was" in line).split("It was")[1:]
    assert plain.strip() == edited.strip()
    assert "0.0000 nats per token" in again
    _, early, _ = command(*args, "--add", "3=20", "--positions", 1)
    assert "0.0000 nats per token" not in early
    code, _, err = command(*args, "--add", "3=20", "--positions", -1)
    assert (code, "--positions -1; expected whole numbers ≥ 0" in err) == (2, True)


def test_doses_prints_a_row_for_each(work, command):
    args = ("doses", work / "run/dictionary", 7, "--prompt", "It was the best", "--prompt", "of times", "--controls", 2)
    code, out, err = command(*args, "--doses", -3, 0, 12.5, "--json", work / "doses.json")
    assert code == 0, err
    rows = json.loads((work / "doses.json").read_text())["doses"]
    assert [row["dose"] for row in rows] == [-3, 0, 12.5]
    assert all(f"{row['effect']:+.4f}".lstrip("+") in out for row in rows)
    assert (rows[1]["kl"], rows[1]["effect"]) == pytest.approx((0, 0), abs=1e-5)
    assert rows[2]["kl"] > 0.01
    code, out, err = command(*args, "--doses", 1, "--token", " of", "--against", " the")
    assert (code, "logit of ' of' − logit of ' the'" in " ".join(out.split())) == (0, True), err


def test_check_hook_prints_the_places_and_marks_the_claimed_one(work, command):
    args = ("check-hook", work / "run/dictionary", "--text", work / "book.txt", "--n-tokens", 200)
    code, out, err = command(*args, "--json", work / "places.json")
    assert code == 0, err
    places = json.loads((work / "places.json").read_text())
    hook = sl.load(work / "run/dictionary").hook
    claimed = places["claimed"].index(True)
    assert (places["reads"][claimed], sum(places["claimed"])) == (hook, 1)
    line = next(line for line in out.splitlines() if "claimed" in line)
    assert hook in line
    assert f"{places['fvu'][claimed]:.3g}" in line


def test_a_dictionary_that_does_not_say_its_hook(work, command):
    """Every command that runs the model takes it, and says so where it is missing."""
    d = sl.load(work / "run/dictionary")
    d.reads = d.writes = (sl.Port(width=d.d_in),)
    d.origin = sl.Origin()
    folder = d.save(work / "homeless")
    (work / "labelled.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 12)
    prompt = ("--prompt", "It was the best of times")
    commands = [
        ("eval", folder, "--text", work / "book.txt", "--n-tokens", 100),
        ("features", folder, "--text", work / "book.txt", "--n-tokens", 100, "--html", work / "homeless.html"),
        ("probe", folder, "--data", work / "labelled.csv", "--ks", 1),
        ("steer", folder, *prompt, "--add", "7=9", "--max-new-tokens", 2),
        ("doses", folder, 7, *prompt, "--doses", 1, "--controls", 0),
        ("attribute", folder, *prompt),
        ("prompt", folder, *prompt),
    ]
    for args in commands:
        code, _, err = command(*args, "--model", "tiny")
        assert (code, "hook" in err) == (2, True), (args[0], err)
        code, out, err = command(*args, "--model", "tiny", "--hook", HOOK)
        assert code == 0, (args[0], err)
        assert out


def test_attribute_prints_a_table(work, command):
    args = ("attribute", work / "run/dictionary", "--prompt", "It was the best of", "--json", work / "attribution.json")
    code, out, err = command(*args, "--token", " times", "--against", " the", "--top", 3)
    assert code == 0, err
    assert "ablation and gradient: Spearman" in out
    found = json.loads((work / "attribution.json").read_text())
    assert found["metric"] == "logit of ' times' − logit of ' the'"
    assert len(found["ablation"]) == len(found["gradient"]) == len(found["latent"]) > 3
    code, out, err = command(*args, "--no-ablation")
    assert code == 0, err
    assert "ablation" not in json.loads((work / "attribution.json").read_text())


def test_prompt_prints_what_fires_where(work, command):
    args = ("prompt", work / "run/dictionary", "--prompt", "It was the", "--json", work / "prompt.json", "--top", 2)
    code, out, err = command(*args, "--by", "attribution", "--token", " times", "--against", " the")
    assert code == 0, err
    assert "latents by effect on logit of ' times' − logit of ' the'" in " ".join(out.split())
    rows = json.loads((work / "prompt.json").read_text())["rows"]
    assert [row["token"] for row in rows] == ["It", "It", " was", " was", " the", " the"]
    assert all(f"{row['attribution']:+.3g}" in out for row in rows)
    features = ("features", work / "run/dictionary", "--text", work / "book.txt", "--n-tokens", 500)
    code, out, err = command(*features, "--out", work / "store", "--html", work / "few.html")
    assert code == 0, err
    code, out, err = command(*args, "--by", "relative", "--store", work / "store")
    assert code == 0, err
    assert "promotes" in out
    code, _, err = command(*args, "--by", "relative")
    assert code == 2
    assert "give --store" in err


def test_plugins(command):
    code, out, _ = command("plugins")
    assert code == 0
    for name in ("l1", "topk", "gated", "jsonl", "tensorboard"):
        assert name in out


def test_train_on_several_hooks(work, command):
    """--writes makes a transcoder and several --reads a crosscoder, from a cache or from a text."""
    hooks = (HOOK, "blocks.1.hook_mlp_out")
    capture = (
        "capture",
        work / "book.txt",
        "--hooks",
        hooks[0],
        "--hooks",
        hooks[1],
        "--out",
        work / "pair",
        "--n-tokens",
        600,
    )
    code, _, err = command(*capture)
    assert code == 0, err
    small = ("--sparsity", "topk", "--options.k", 4, "--d-sae", 16, "--n-tokens", 512, "--batch-size", 128)
    asked = {
        "across": ("--hook", hooks[0], "--writes", hooks[1]),
        "crossed": ("--reads", hooks[0], "--reads", hooks[1]),
    }
    made = {"across": ((hooks[0],), (hooks[1],)), "crossed": (hooks, hooks)}
    for name, flags in asked.items():
        for source in ((work / "pair",), ("--text", work / "book.txt", "--buffer-tokens", 512)):
            out = work / f"{name} {len(source)}"
            code, _, err = command("train", *source, *flags, *small, "--out", out)
            assert code == 0, err
            d = sl.load(out / "dictionary")
            assert tuple(tuple(port.hook for port in side) for side in (d.reads, d.writes)) == made[name]
    code, _, err = command("train", work / "pair", "--hook", hooks[0], "--reads", hooks[1], *small, "--out", work / "both")
    assert (code, "contradict each other; leave out --hook" in err) == (2, True), err


def test_train_with_loggers(work, command):
    args = ("train", work / "cache", "--d-sae", 16, "--n-tokens", 512, "--batch-size", 256)
    code, _, err = command(*args, "--loggers", "tensorboard, jsonl", "--out", work / "logged")
    assert code == 0, err
    assert (work / "logged/log.jsonl").stat().st_size > 0
    assert list((work / "logged/tensorboard").glob("events.out.tfevents.*"))
    code, _, err = command(*args, "--loggers", "", "--out", work / "unlogged")
    assert code == 0, err
    assert sorted(path.name for path in (work / "unlogged").iterdir()) == ["config.toml", "data.json", "dictionary"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["trainn"], 'Did you mean "train"'),
        (["train", "CACHE", "--d-saee", "4"], "--d-sae"),
        (["train", "CACHE", "--d-sae", "-4"], "greater than 0"),
        (["train", "CACHE", "--sparsity", "topkk"], "did you mean topk"),
        (["train", "CACHE", "--options.kk", "3"], "unknown key 'kk'; did you mean k"),
        (["train", "CACHE", "--hook", "blocks.1.hook_resid_prre"], "did you mean blocks.1.hook_resid_pre"),
        (["train", "CACHE", "--config", "nowhere.toml"], "no such settings file"),
        (["train", "CACHE", "--loggers", "jsonl,tensorbord"], "did you mean tensorboard"),
        (["train", "nowhere"], "manifest.json is missing"),
        (["capture", "nowhere.txt", "--hooks", HOOK], "no text file at nowhere.txt"),
        (["capture", "BOOK", "--hooks", "blocks.9.hook_resid_pre", "--out", "elsewhere"], "no hook 'blocks.9.hook_resid_pre'"),
        (["capture", "BOOK", "--hooks", HOOK, "--out", "CACHE"], "already exists"),
        (["capture", "BOOK", "--hooks", HOOK, "--model", "./nowhere"], "no model folder at ./nowhere"),
        (["eval", "nowhere"], "cfg.json is missing"),
        (["compare", "nowhere", "elsewhere"], "cfg.json is missing"),
        (["probe", "DICT", "--data", "nowhere.csv"], "no labelled texts at nowhere.csv"),
        (["steer", "nowhere", "--prompt", "It", "--ablate", "3"], "cfg.json is missing"),
        (["steer", "DICT", "--prompt", "It"], "at least one edit"),
        (["steer", "DICT", "--prompt", "It", "--clamp", "7"], "--clamp 7: expected LATENT=NUMBER, such as --clamp 7=0.5"),
        (["steer", "DICT", "--prompt", "It", "--add", "7=nan"], "Add: amount = nan; expected a finite number"),
        (["steer", "DICT", "--prompt", "It", "--ablate", "64"], "no latent 64; this dictionary has latents 0 to 63"),
        (["steer", "DICT", "--prompt", "", "--ablate", "3"], "empty text"),
        (["attribute", "DICT", "--prompt", "It was", "--token", " he"], "--token and --against go together"),
        (["prompt", "DICT", "--prompt", ""], "empty text"),
        (["attribute", "DICT", "--prompt", "It was", "--token", " he", "--against", " she and"], "is not one token of tiny"),
        (["inspect", "nowhere"], "is missing"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(work, monkeypatch, args, says, command):
    places = {"CACHE": work / "cache", "BOOK": work / "book.txt", "DICT": work / "run/dictionary"}
    monkeypatch.chdir(work)
    code, out, err = command(*(places.get(arg, arg) for arg in args))
    assert code == 2
    assert says in err
    assert err.startswith("saelens-lite: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


def test_a_diverged_run_exits_1_and_keeps_the_last_good_dictionary(work, monkeypatch, command):
    from saelens_lite.training import Trainer

    real = Trainer.step

    def poisoned(self, batch, *more):
        real(self, batch if self.n_steps < 2 else {hook: x * torch.nan for hook, x in batch.items()}, *more)

    monkeypatch.setattr(Trainer, "step", poisoned)
    code, _, err = command("train", work / "cache", "--d-sae", 16, "--batch-size", 64, "--out", work / "nan")
    assert code == 1
    assert "the activations became NaN or infinite in step 3" in err
    assert (work / "nan/last_good/cfg.json").exists()
    assert not (work / "nan/dictionary").exists()


def test_traceback_on_request():
    failed = run("inspect", "nowhere", "--traceback")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    assert "CorruptFileError" in failed.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['saelens-lite', 'train', '--help']\nfrom saelens_lite import cli\ntry:\n    cli.main()\n"
        "except SystemExit:\n    pass\nassert not {'torch', 'transformers', 'transformer_lens'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--d-sae" in done.stdout
