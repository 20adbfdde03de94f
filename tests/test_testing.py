"""The conformance kit passes what is right and, for each of its checks, fails what is wrong in just that respect."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import saelens_lite as sl
from saelens_lite import errors, registry
from saelens_lite.errors import PluginError
from saelens_lite.formats import AXES, Outline, cannot_write, open_tensors, tensor_names, write_tensors
from saelens_lite.sparsity import support_of_mask
from saelens_lite.testing import check_plugin, loggers, rules
from saelens_lite.testing.unordered import UnorderedSums
from saelens_lite.training import Trainer

LR_AT = Trainer.lr_at
SMALL = {"batch": 64, "d_in": 32, "d_sae": 96}
BUILT_IN = [plugin.name for plugin in registry.plugins() if plugin.distribution == registry.OWN_DISTRIBUTION]


OPTIONS = {"matryoshka": {"k": 4, "prefixes": (0.5,)}}  # of the default prefixes the first has 3 of 96 latents


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_rule_passes(name):
    report = check_plugin(registry.load(name), options=OPTIONS.get(name))
    report.raise_if_failed()
    assert {check.status for check in report.checks} <= {"ok", "not checked"}
    assert report["planted truth"].status == "ok"
    assert [check.name for check in report.checks] == [name for name, _, _ in rules.CHECKS]


@pytest.mark.parametrize("name", ["jsonl", "tensorboard"])
def test_a_built_in_logger_passes(name):
    report = check_plugin(registry.load(name, "loggers"))
    report.raise_if_failed()
    assert {check.status for check in report.checks} == {"ok"}


# Rules that break one thing each


class Relu(sl.Sparsity):
    """Positive ones: nothing is wrong with it."""

    paper = "Nobody 2020"
    row_wise = True

    def activation(self, pre):
        return pre.relu()

    def support(self, pre):
        return support_of_mask(pre > 0)

    def values(self, pre, latent):
        return pre.relu()


class NoDefaults(Relu):
    class Config(sl.RuleConfig):
        gain: float


class NameTaken(Relu):
    def losses(self, step):
        return {"l0": step.codes.value.sum() * 1e-3 / len(step.x)}


class PerRow(Relu):
    def losses(self, step):
        return {"norm": step.x_hat.norm(dim=1)}


class NotATensor(Relu):
    def losses(self, step):
        return {"constant": 1.0}


class NotFinite(Relu):
    def losses(self, step):
        return {"log": step.dead.sum().float().log() * 0 + step.codes.value.sum() / 0}


class Raises(Relu):
    def losses(self, step):
        raise ZeroDivisionError("no luck")


class DefinesNothing(sl.Sparsity):
    """Nothing."""

    paper = "Nobody 2020"


class Float32Values(Relu):
    def values(self, pre, latent):
        return pre.relu().float()


class Float32Loss(Relu):
    def losses(self, step):
        return {"l1": step.codes.value.sum().float() * 1e-3 / len(step.x)}


class LargestOfBatch(Relu):
    """The largest tenth of the batch, wrongly said to be chosen row by row."""

    homogeneous = False

    def support(self, pre):
        return support_of_mask(pre > (pre.flatten().topk(pre.numel() // 10).values[-1].clamp(min=0) if self.training else 0))

    def activation(self, pre):
        support = self.support(pre)
        return pre * torch.zeros_like(pre, dtype=torch.bool).index_put((support.row, support.latent), torch.tensor(True))


class StraightThrough(Relu):
    """Zeros with a gradient, which the support does not have."""

    support, values = sl.Sparsity.support, sl.Sparsity.values

    def activation(self, pre):
        return pre.relu() + 0.1 * (pre - pre.detach()) * (pre < 0)


class FirstTile(Relu):
    def losses(self, step):
        return {"level": next(iter(step.pre_tiles(torch.arange(self.d_sae)))).square().mean()}


class TwoDefinitions(Relu):
    def activation(self, pre):
        return 1.1 * pre.relu()


class LooksAtTheBatch(Relu):
    support, values = sl.Sparsity.support, sl.Sparsity.values

    def activation(self, pre):
        return pre.relu() if self.training else (pre - pre.mean(0)).relu()


class WrongThreshold(Relu):
    def inference_form(self):
        return sl.PublishedForm("jumprelu", {"threshold": torch.full((self.d_sae,), 0.5, dtype=torch.float64)})


class NoK(Relu):
    def inference_form(self):
        return sl.PublishedForm("topk")


class FixedThreshold(Relu):
    support, values = sl.Sparsity.support, sl.Sparsity.values

    def activation(self, pre):
        return (pre - 0.1).relu()


class PlainAttribute(Relu):
    homogeneous = False
    support, values = sl.Sparsity.support, sl.Sparsity.values

    def __init__(self, config, *, d_in, d_sae):
        super().__init__(config, d_in=d_in, d_sae=d_sae)
        self.shift = 0.1 * torch.rand(d_sae)

    def activation(self, pre):
        return (pre - self.shift.to(pre.dtype)).relu()


class WrongTensor(Relu):
    """Publishes another tensor under the name of its parameter."""

    def __init__(self, config, *, d_in, d_sae):
        super().__init__(config, d_in=d_in, d_sae=d_sae)
        self.gain = nn.Parameter(torch.ones(d_sae))

    def inference_form(self):
        return sl.PublishedForm("unheard of", {"gain": self.gain + 1})


class MeanOfCodes(Relu):
    def losses(self, step):
        return {"mean": 0.01 * step.codes.value.mean()}


class LooksAtX(Relu):
    def losses(self, step):
        return {"twice": (step.x - step.x_hat).square().sum(1).mean()}


class ReadByIndex(Relu):
    """A parameter read in a way whose gradient is summed in no fixed order."""

    def __init__(self, config, *, d_in, d_sae):
        super().__init__(config, d_in=d_in, d_sae=d_sae)
        self.gain = nn.Parameter(torch.ones(d_sae))

    def activation(self, pre):
        return pre.relu() * self.gain

    def values(self, pre, latent):
        return pre.relu() * self.gain[latent]


class ReadByIndexSelect(ReadByIndex):
    """The same by another name."""

    def values(self, pre, latent):
        return pre.relu() * self.gain.index_select(0, latent)


class ReadByAt(ReadByIndex):
    """The same as it should be."""

    def values(self, pre, latent):
        return pre.relu() * self.at(self.gain, latent)


class SumsInNoOrder(Relu):
    """A running estimate for each latent, summed by atomics."""

    def __init__(self, config, *, d_in, d_sae):
        super().__init__(config, d_in=d_in, d_sae=d_sae)
        self.register_buffer("total", torch.zeros(d_sae))

    def observe(self, step):
        self.total.index_add_(0, step.codes.latent, step.codes.value.to(self.total.dtype))


class Signed(sl.Sparsity):
    """The eight largest by size, with their sign."""

    paper = "Nobody 2020"
    homogeneous = False

    def activation(self, pre):
        i = pre.abs().topk(8).indices
        return torch.zeros_like(pre).scatter(-1, i, pre.gather(-1, i))


class SignedValues(Relu):
    """Without `activation`, so that only training shows the sign."""

    activation = sl.Sparsity.activation

    def support(self, pre):
        return support_of_mask(pre.abs() > 1)

    def values(self, pre, latent):
        return pre


class AsItIs(Relu):
    """Pre-activations, which are positive only where the support was chosen from the same numbers."""

    def values(self, pre, latent):
        return pre


class ForgetsTheGate(Relu):
    """A jump at 0.5, which `values` leaves to the support."""

    homogeneous = False

    def activation(self, pre):
        return pre * (pre > 0.5)

    def support(self, pre):
        return support_of_mask(pre > 0.5)


class Counts(Relu):
    n = 0

    def after_step(self, dictionary):
        self.n += 1

    def losses(self, step):
        return {"l1": 1e-3 * self.n * step.codes.value.sum() / len(step.x)}


class NeverLearns(Relu):
    def after_step(self, dictionary):
        dictionary.W_dec.data.copy_(torch.eye(self.d_in).repeat(self.d_sae // self.d_in, 1))


BROKEN = [
    (NoDefaults, "config", r"Config\(\) should work without arguments, but raises: NoDefaults: 'gain' is required"),
    (NameTaken, "losses", r"a loss is called 'l0', a name that log lines already use"),
    (PerRow, "losses", r"loss 'norm' should be .* without axes, but is a tensor \(48,\) of torch\.float32"),
    (NotATensor, "losses", r"loss 'constant' should be a floating-point tensor without axes, but is 1\.0"),
    (NotFinite, "losses", r"loss 'log' is (nan|inf) on ordinary data"),
    (Raises, "losses", r"raised ZeroDivisionError: no luck \(test_testing\.py:\d+, losses\)"),
    (DefinesNothing, "losses", r"raised NotImplementedError: DefinesNothing must define activation\(pre\)"),
    (Signed, "trains", r"check_plugin\.Signed gave a negative code \(-\d.*\)\. Codes must be ≥ 0, .*End `activation`"),
    (SignedValues, "trains", r"gave a negative code"),
    (AsItIs, "trains", r"a code is negative \(-0\.\d+\) if the support comes from rounded .*end `values` with"),
    (Float32Values, "dtypes", r"a step in float64 raises .*; make tensors like those given"),
    (Float32Loss, "dtypes", r"loss l1 of a float64 step should be float64, but is torch\.float32"),
    (LargestOfBatch, "row_wise", r"row_wise = True, but \d+ pairs change if a batch is split in halves"),
    (StraightThrough, "gradients", r"gradient of .* is \d.* off dense float64 autograd .*; let nothing depend on"),
    (FirstTile, "gradients in tiles", r"loss level is .* off dense float64 autograd .*; read all of `step\.pre_tiles`"),
    (LooksAtX, "transcoder", r"a step of a transcoder raises RuntimeError: .*; x_hat is to be step\.target, not step\.x"),
    (TwoDefinitions, "definitions", r"codes by support and values are .* \(relative\) off activation; make them agree"),
    (ForgetsTheGate, "definitions", r"codes by values are .* off activation if the support comes from rounded pre-"),
    (LooksAtTheBatch, "eval codes", r"codes in eval mode change by .* with the rest of the batch; use each row alone"),
    (WrongThreshold, "published form", r"codes in eval mode are .* off those of the published jumprelu; return None, or"),
    (NoK, "published form", r"topk needs k; give it in the PublishedForm"),
    (FixedThreshold, "folding", r"off after fold_decoder_norms_; define rescale_ .* or set homogeneous = False"),
    (PlainAttribute, "round trip", r"codes change when a dictionary is saved and loaded, .*register_buffer"),
    (WrongTensor, "round trip", r"rule\.gain change when saved and loaded; inference_form must return them"),
    (MeanOfCodes, "empty and full", r"loss mean is NaN or infinite when nothing fires \(L0 0\); divide sums by len\(step\.x\)"),
    (ReadByIndex, "same bytes", r"sums floats without a fixed order on a GPU, by index_put \(backward pass\); .*self\.at"),
    (ReadByIndexSelect, "same bytes", r"sums floats without a fixed order on a GPU, by index_add \(backward pass\); read per-"),
    (SumsInNoOrder, "same bytes", r"sums floats without a fixed order on a GPU, by index_add \(test_testing\.py:\d+\); "),
    (Counts, "resume", r"differ after training was stopped and resumed; .*step\.progress"),
    (NeverLearns, "planted truth", r"reach a mean cosine of .* with 96 planted directions at L0"),
]  # fmt: skip


def test_there_is_a_broken_rule_for_every_check():
    assert {check for _, check, _ in BROKEN} == {name for name, _, _ in rules.CHECKS} - {"described"}


@pytest.mark.parametrize(("rule", "check", "found"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_rule_fails_its_check_and_no_other(rule, check, found, monkeypatch):
    if check != "same bytes":
        monkeypatch.setattr(rules, "PARALLEL", SMALL)
    options = {"gain": 1.0} if rule is NoDefaults else None
    report = check_plugin(rule, options=options, planted=0.5 if check == "planted truth" else None)
    assert [failed.name for failed in report.failed] == [check], str(report)
    with pytest.raises(PluginError, match=found):
        report.raise_if_failed()
    assert not report.ok


def test_what_is_right_passes_with_reasons_for_what_was_not_checked():
    report = check_plugin(Relu, planted=None)
    assert report.ok
    report.raise_if_failed()
    assert {check.name: check.found for check in report.checks if check.status != "ok"} == {
        "published form": "inference_form is not defined, so other tools cannot read its dictionaries",
        "planted truth": "planted = None",
    }
    assert report.summary() == "2 not checked, 16 ok"


def test_a_parameter_read_by_at_passes():
    assert check_plugin(ReadByAt, planted=None).ok


def test_operations_that_add_no_two_floats_to_one_cell_are_no_unordered_sums():
    x, mask = torch.randn(6, requires_grad=True), torch.tensor([True, False, True, True, False, False])
    place, twice = torch.tensor([4, 0, 5]), torch.tensor([4, 0, 4])
    with UnorderedSums() as sums:
        (x[mask].sum() + x[place].sum() + x.index_select(0, place).sum() + x.gather(0, place).sum()).backward()
        torch.zeros(6, dtype=torch.long).index_add_(0, twice, torch.ones(3, dtype=torch.long))
        torch.zeros(6).scatter_reduce_(0, twice, torch.ones(3), "amax")
        torch.zeros(6).index_put_((twice,), torch.ones(()))
    assert sums.noted == []
    for read in (lambda: x[twice], lambda: x.index_select(0, twice), lambda: x.gather(0, twice), lambda: x.take(twice)):
        with UnorderedSums() as sums:
            read().sum().backward()
        assert [place.split()[1:] for place in sums.noted] == [["(backward", "pass)"]]
    with UnorderedSums() as sums:
        torch.bincount(twice, torch.ones(3))
        torch.zeros(6).scatter_reduce_(0, twice, torch.ones(3), "sum")
        torch.zeros(6).put_(twice, torch.ones(3), accumulate=True)
    assert [place.split()[0] for place in sums.noted] == ["bincount", "scatter_reduce", "put"]
    assert all("(test_testing.py:" in place for place in sums.noted)


def test_training_that_cannot_begin_fails():
    class Explodes(Relu):
        def after_step(self, dictionary):
            if dictionary.W_dec.grad is not None:
                raise RuntimeError("behind the first step")

    report = check_plugin(Explodes, planted=None)
    assert [failed.name for failed in report.failed] == ["trains"]
    assert "raised RuntimeError: behind the first step" in report["trains"].found
    assert report["resume"] == ("resume", "not checked", "needs: trains")


def test_a_rule_that_says_nothing_of_itself_is_a_warning():
    class Silent(Relu):
        paper = ""

    report = check_plugin(Silent, planted=None)
    assert report.ok
    assert report["described"].status == "warning"
    assert report["described"].found.startswith("paper and a docstring missing")


def test_a_hint_when_row_wise_could_be_declared():
    class Modest(Relu):
        row_wise = False

    assert check_plugin(Modest, planted=None)["row_wise"].found.startswith("hint: declare row_wise = True")


# The report, names, and the command line


def test_a_report_has_a_line_a_check_and_a_class_is_left_as_it_was():
    report = check_plugin(FixedThreshold, planted=None)
    lines = str(report).splitlines()
    assert lines[0].startswith("sparsity rule FixedThreshold: 1 failed, ")
    assert max(map(len, lines)) <= 80
    started = iter(" ".join(line.split()) for line in lines)
    assert all(any(line.startswith(f"{c.name} {c.status} ") for line in started) for c in report.checks)  # in this order
    assert report.to_frame().to_dict("records") == [check._asdict() for check in report.checks]
    assert "plugin_name" not in FixedThreshold.__dict__
    assert not [name for name in registry.names() if "check_plugin" in name]


def test_a_registered_rule_keeps_its_name():
    sl.register("relu_of_tests")(Relu)
    try:
        assert check_plugin(Relu, planted=None).ok
        assert registry.load("relu_of_tests") is Relu
        assert Relu.plugin_name == "relu_of_tests"
        registry.unregister("relu_of_tests")
        assert check_plugin(Relu, planted=None).ok
        assert Relu.plugin_name == "relu_of_tests"
        assert not [name for name in registry.names() if "check_plugin" in name]
    finally:
        registry.unregister("relu_of_tests")
        del Relu.plugin_name


@pytest.mark.parametrize("thing", [object, nn.Linear, sl.FeatureStore])
def test_what_is_no_plugin_cannot_be_checked(thing):
    with pytest.raises(PluginError, match="cannot be checked: give a class derived from"):
        check_plugin(thing)


@pytest.fixture
def listed():
    """Two rules to ask for by name, one of them broken."""
    found = {"relu_of_tests": Relu, "counts_of_tests": Counts}
    for name, rule in found.items():
        sl.register(name)(rule)
    yield
    for name, rule in found.items():
        registry.unregister(name)
        del rule.plugin_name


def test_the_command_line_checks_and_says_so_in_its_exit_code(listed, command):
    code, out, _ = command("plugins", "--check", "relu_of_tests")
    assert code == 0
    assert "sparsity rule Relu: " in out
    assert "largest relative error" in out
    code, out, _ = command("plugins", "--check", "sparsity:counts_of_tests", "--json")
    assert code == 1
    assert [c["name"] for c in json.loads(out)["checks"] if c["status"] == "failed"] == ["resume"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--check", "top_k"), "no plugin is called 'top_k'; did you mean topk?"),
        (("--check", "jsonl", "--options.k", "3"), "options = {'k': 3} were given for Jsonl, but loggers take no options"),
        (("--options.k", "3"), "--options belong to the rule that is checked; add --check NAME"),
    ],
)
def test_the_command_line_refuses(args, message, command):
    code, _, err = command("plugins", *args)
    assert code == 2
    assert message in err


# Loggers that break one thing each


class Quiet(sl.Logger):
    """Nothing is wrong with it."""

    def log(self, line):
        pass


class NoLog(sl.Logger):
    pass


class ClosesItsFile(Quiet):
    def log(self, line):
        self.open = True

    def close(self):
        del self.open


class OneAtATime(Quiet):
    active: object = None

    def start(self, folder, config, tokens=0):
        type(self).active = self

    def log(self, line):
        assert type(self).active, "no run is active"

    def close(self):
        type(self).active = None


class OnlyOnce(Quiet):
    def start(self, folder, config, tokens=0):
        (folder / "mine").mkdir()


class SpoilsHistory(Quiet):
    """Changes the dictionaries that are trained while it is open."""

    def start(self, folder, config, tokens=0):
        Trainer.lr_at = lambda self, progress: 0.5

    def close(self):
        Trainer.lr_at = LR_AT


class SpoilsSettings(Quiet):
    def start(self, folder, config, tokens=0):
        config.options["k"] = config.options["k"] + 1


@pytest.mark.parametrize(
    ("logger", "check", "found"),
    [
        (NoLog, "follows a run", r"raised NotImplementedError: NoLog must define log\(line\)"),
        (ClosesItsFile, "without lines", r"raised AttributeError"),
        (OneAtATime, "side by side", r"raised AssertionError: no run is active"),
        (OnlyOnce, "resume", r"raised FileExistsError"),
        (SpoilsHistory, "numbers", r"differ from (those|a run) without the logger"),
    ],
)
def test_a_broken_logger_fails_its_check_and_no_other(logger, check, found):
    report = check_plugin(logger)
    assert [failed.name for failed in report.failed] == [check], str(report)
    with pytest.raises(PluginError, match=found):
        report.raise_if_failed()


def test_a_logger_that_changes_its_settings_fails():
    try:
        report = check_plugin(SpoilsSettings)
    finally:
        loggers.CONFIG.options["k"] = 2
    assert "the settings given to start were changed; work on a copy" in report["follows a run"].found


def test_a_quiet_logger_passes():
    assert check_plugin(Quiet).ok


# Formats that break one thing each


class OwnFiles(sl.Format):
    """A file of the parameters by our names; nothing is wrong with it."""

    def detect(self, path):
        return {"W_enc", "b_enc", "W_dec", "b_dec"} == tensor_names(path / "own.safetensors")

    def outline(self, path):
        file = open_tensors(path / "own.safetensors")
        names = {name: (name, axes) for name, axes in AXES.items() if name in file.specs}
        return Outline(file, "l1", names | {"b_enc": ("b_enc", "d_sae")})

    def write(self, dictionary, folder):
        if dictionary.rule.plugin_name != "l1" or not dictionary.writes_what_it_reads:
            raise cannot_write(dictionary, "own", "it is for l1")
        write_tensors(folder / "own.safetensors", dict(dictionary.named_parameters()) | {"W_enc": dictionary.W_enc})


class DoesNothing(sl.Format):
    pass


class DetectsEverything(OwnFiles):
    def detect(self, path):
        return True


class ForgetsBias(OwnFiles):
    def write(self, dictionary, folder):
        super().write(dictionary, folder)
        tensors = load_file(folder / "own.safetensors")
        write_tensors(folder / "own.safetensors", tensors | {"b_dec": tensors["b_dec"] * 0})


class BelievesWhatIsLeft(OwnFiles):
    def read(self, path):
        try:
            return super().read(path)
        except errors.CorruptFileError:
            if not (path / "own.safetensors").exists():
                raise
            return sl.Dictionary.create("l1", reads=8, d_sae=32)


@pytest.mark.parametrize(
    ("format", "check", "found"),
    [
        (DoesNothing, "reads or writes", r"neither outline\(path\) nor write\(dictionary, folder\) is defined"),
        (DetectsEverything, "junk", "detect accepts empty, which holds nothing"),
        (ForgetsBias, "round trip", r"x_hat of l1 are .* \(relative\) off when read again"),
        (BelievesWhatIsLeft, "damage", r"own\.safetensors cut to 0 of .* bytes is read without CorruptFileError"),
    ],
)
def test_a_broken_format_fails_its_check_and_no_other(format, check, found):
    report = check_plugin(format)
    assert [failed.name for failed in report.failed] == [check], str(report)
    with pytest.raises(PluginError, match=found):
        report.raise_if_failed()


@pytest.mark.parametrize("name", registry.names("formats"))
def test_built_in_formats_pass(name):
    report = check_plugin(registry.load(name, "formats"))
    report.raise_if_failed()
    assert report["reads or writes"].found


class NamesTooMuch(OwnFiles):
    def outline(self, path):
        names = {name: (name, axes) for name, axes in AXES.items() if name in ("W_enc", "W_dec", "b_dec")}
        return Outline(open_tensors(path / "own.safetensors"), "l1", names | {"rule.b_enc": ("b_enc", "d_sae")})


def test_a_format_that_names_parameters_the_rule_lacks(tmp_path):
    d = sl.Dictionary.create("l1", reads=8, d_sae=16)
    NamesTooMuch().write(d, tmp_path)
    with pytest.raises(PluginError, match=r"format own names \['W_dec', 'W_enc', .*'rule\.b_enc'\]; a l1 dictionary has"):
        NamesTooMuch().outline(tmp_path).build("own")


def test_a_format_without_fault_passes_and_has_no_options():
    assert check_plugin(OwnFiles).summary() == "4 ok"
    with pytest.raises(PluginError, match="were given for OwnFiles, but formats take no options"):
        check_plugin(OwnFiles, options={"k": 3})
