"""The splices of an evaluation: ports that are replaced together in a forward pass, and the models that run with them.

| the dictionary writes | splices |
| --- | --- |
| one port | that port |
| several ports of a model | all of them together, and each alone |
| ports of several models | the same for each model |

A port that is the difference chat − base is replaced in chat, whose activation becomes that of base plus the new difference.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.errors import ConfigError
from saelens_lite.evaluation import metrics
from saelens_lite.evaluation.sums import Metric, PooledSums
from saelens_lite.model import AnyModel, LanguageModel, Models
from saelens_lite.model.partial_forward import PartialForward
from saelens_lite.ports import Hooks, Key, difference, together
from saelens_lite.tokens import TokenRows
from saelens_lite.tokens.inputs import Ids

ByPart = dict[str, dict[str, Metric]]  # metrics by port or model


class ReplacedPorts(NamedTuple):
    """Written ports of one model, by number, whose activations are replaced together.

    `label` ends the names of its sums, and `clean` those of its model's pass without replacement; "" stands for all written
    ports and for the only model that is written.
    """

    label: str
    clean: str
    model: str | None
    ports: tuple[int, ...]


def splices_of(writes: Sequence[Key]) -> list[ReplacedPorts]:
    """Return the splices of written ports; those of all ports of a model come before those of each alone.

    Raises:
        ConfigError: two ports are one hook of one model.
    """
    if len({(key.model, key.hook) for key in writes}) < len(writes):
        raise ConfigError("the dictionary writes a hook both as it is and as a difference, which cannot be replaced together")
    models, splices = list(dict.fromkeys(key.model for key in writes)), []
    for model in models:
        ports = tuple(i for i, key in enumerate(writes) if key.model == model)
        clean = "" if len(models) == 1 else f" in {model}"
        splices.append(ReplacedPorts(clean, clean, model, ports))
        if len(ports) > 1:
            splices += [ReplacedPorts(f" at port {i}", clean, model, (i,)) for i in ports]
    return splices


def each_model(lm: AnyModel) -> dict[str | None, LanguageModel]:
    """Return the models by name; the name of a single one is None."""
    return lm.models if isinstance(lm, Models) else {None: lm}


def check_models(lm: AnyModel, hooks: Hooks, by_position: bool) -> None:
    """Raise ConfigError or HookError if the models that are written cannot be measured."""
    reads, writes = ([_key(lm, name) for name in side] for side in hooks)
    written = dict.fromkeys(key.model for key in writes)
    for name in written:
        each_model(lm)[name].check_causal("evaluate, which measures the loss of the next token,")
    if len(written) > 1 and by_position:
        raise ConfigError(
            f"by_position measures the loss of one model; this dictionary writes {' and '.join(map(str, written))}: leave out "
            "by_position"
        )
    if hooks.reads != hooks.writes and len(reads) == len(writes) == 1 and reads[0].model == writes[0].model:
        each_model(lm)[reads[0].model].check_order(reads[0].hook, writes[0].hook)


class SplicedModels:
    """The models of an evaluation, which run clean and with splices.

    `columns` are those of each written port among all, and `splices` begin with the one of all ports of the first model.
    """

    def __init__(self, lm: AnyModel, hooks: Hooks, probe: TokenRows):
        self.lm, self.hooks = lm, hooks
        self._models = each_model(lm)
        self._keys = {name: _key(lm, name) for name in hooks.all}
        self._writes = [self._keys[name] for name in hooks.writes]
        self.splices = splices_of(self._writes)
        self.columns = [slice(None)]
        if len(hooks.writes) > 1:
            acts = lm.run(probe.narrowed(1), hooks.writes)
            ends = torch.tensor([0, *(acts[name].shape[-1] for name in hooks.writes)]).cumsum(0).tolist()
            self.columns = [slice(*ends[i : i + 2]) for i in range(len(ends) - 1)]
        self._partial = {
            splice.label: PartialForward(
                self._models[splice.model],
                [self._writes[i].hook for i in splice.ports],
                probe.tokens.to(self._models[splice.model].device),
            )
            for splice in self.splices
        }
        self._of_part: dict[tuple[str | None, str], Tensor] = {}  # activations that differences subtract
        self._dtypes: dict[tuple[str | None, str], torch.dtype] = {}

    @property
    def parts(self) -> list[slice]:
        """The columns of each written port; none if there is only one."""
        return self.columns if len(self.columns) > 1 else []

    @property
    def of_model(self) -> dict[str | None, ReplacedPorts]:
        """The splice of all ports of each model that is written."""
        return {splice.model: splice for splice in self.splices if splice.label == splice.clean}

    def alone(self, port: int) -> ReplacedPorts:
        """Return the splice of one port."""
        return next(splice for splice in self.splices if splice.ports == (port,))

    def read(
        self, tokens: Int[Tensor, "n pos"], first: int
    ) -> tuple[dict[str, Float[Tensor, "n pos _"]], dict[str, Float[Tensor, "n n_logits d_vocab"]]]:
        """Run each model on tokens. Return the activations at ports, and the logits from position `first` on by `clean`."""
        acts, logits = {}, {}
        for name, lm in self._models.items():
            hooks = [key.hook for key in self._keys.values() if name in (key.model, key.minus)]
            hooks, here = list(dict.fromkeys(hooks)), tokens.to(lm.device)
            if own := [splice for splice in self.splices if splice.model == name]:
                main, *others = (self._partial[splice.label] for splice in own)
                with ExitStack() as stack:
                    for other in others:
                        stack.enter_context(other.noting())
                    read, logits[own[0].clean] = main.read(here, hooks, first=first)
            else:
                read = lm.run(Ids(here, None), hooks) if hooks else {}
            acts |= {(name, hook): x.to(self.lm.device) for hook, x in read.items()}
        subtracted = {(key.minus, key.hook) for key in self._writes if key.minus is not None}
        self._of_part = {part: acts[part] for part in subtracted}
        self._dtypes = {part: x.dtype for part, x in acts.items()}
        return {name: _value(acts, key) for name, key in self._keys.items()}, logits

    def is_constant(self, splice: ReplacedPorts) -> bool:
        """Return whether a constant in place of the ports of a splice gives every row the same logits."""
        return self._partial[splice.label].is_whole_stream and all(self._writes[i].minus is None for i in splice.ports)

    def logits(
        self, splice: ReplacedPorts, tokens: Int[Tensor, "n pos"], y: Float[Tensor, "n pos d"], first: int = 0
    ) -> Float[Tensor, "n n_logits d_vocab"]:
        """Return the logits from position `first` on, with the ports of a splice replaced by their columns of y.

        Args:
            tokens: The tokens of the last `read`; any others only if `is_constant`.
        """
        device = self._models[splice.model].device
        new = together([self._new(self._writes[i], y[..., self.columns[i]].to(device)) for i in splice.ports])
        return self._partial[splice.label].logits(tokens.to(device), new, first)

    def _new(self, key: Key, x: Float[Tensor, "n pos d"]) -> Float[Tensor, "n pos d"]:
        """Return the activation of a model at a hook, given that of the port."""
        if key.minus is not None:
            x = x + self._of_part[key.minus, key.hook].to(x)
        return x.to(self._dtypes.get((key.model, key.hook), x.dtype)) if key.model is not None else x

    def metrics(self, sums: PooledSums, name: str) -> tuple[ByPart | None, ByPart | None]:
        """Return the metrics of each port, if there are several, and of each model that is written, if there are several."""

        def of(splice: ReplacedPorts) -> dict[str, Metric]:
            fit = metrics.part_metrics(sums, name, [self.columns[i] for i in splice.ports])
            return fit | metrics.prediction_metrics(sums, name, splice.label, splice.clean)

        keys, of_model = self.hooks.writes, self.of_model
        by_port = {key: of(self.alone(i)) for i, key in enumerate(keys)} if len(keys) > 1 else None
        by_model = {str(model): of(splice) for model, splice in of_model.items()} if len(of_model) > 1 else None
        return by_port, by_model

    def everywhere(
        self, splice: ReplacedPorts, value: Float[Tensor, " d"], tokens: Int[Tensor, "n pos"]
    ) -> Float[Tensor, "n pos d"]:
        """Return a vector at all positions of some tokens, in the number type of a splice's model."""
        dtype = self._models[splice.model].dtype
        if any(self._writes[i].minus is not None for i in splice.ports):
            dtype = torch.promote_types(dtype, torch.float32)
        return value.to(dtype).expand(*tokens.shape, -1)


def _key(lm: AnyModel, name: str) -> Key:
    """Return the parts of a key of several models; a hook of a single one is a key without a model."""
    return lm.split(name) if isinstance(lm, Models) else Key(None, None, name)


def _value(acts: dict[tuple[str | None, str], Tensor], key: Key) -> Float[Tensor, "n pos d"]:
    x = acts[key.model, key.hook]
    return x if key.minus is None else difference(x, acts[key.minus, key.hook])
