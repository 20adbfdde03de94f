"""Ask a judge: the contract of a judge, which runs another project's evaluation with that project's own code.

    class CountOptions(JudgeConfig):
        n_rows: int = Field(16, description="Texts to read.")

    @register("counter")
    class Counter(Judge):
        "The number of latents that fire, as the package counter counts them."

        Config = CountOptions

        def evaluate(self, dictionaries, lm):
            from counter import count                                      # imported only when it is used

            return [count(self.sae(d), lm.bridge(), self.config.n_rows) for d in dictionaries]

        def sae(self, dictionary):
            return SomeObject(dictionary)                                  # the SAE class of that package

    (report,) = sl.judge("counter", n_rows=4).evaluate([d], lm)

A package names the class in the entry-point group `saelens_lite.judges`. A judge supplies `evaluate`, `sae` or both:
`evaluate` if the project can be run from here, and `sae` if the project has functions of its own that take an SAE.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from saelens_lite import registry
from saelens_lite.config import FrozenConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.model import LanguageModel
from saelens_lite.progress import progress_bar
from saelens_lite.tokens.encoding import after_bos

__all__ = ["Judge", "JudgeConfig", "after_bos", "judge", "progress_bar"]


class JudgeConfig(FrozenConfig):
    """Base of a judge's options."""


class Judge:
    """Base of all judges, with the options in `config`; `sl.judge` makes one."""

    plugin_kind: ClassVar[str] = "judges"
    plugin_name: ClassVar[str]  # set by the registry
    Config: ClassVar[type[JudgeConfig]] = JudgeConfig

    def __init__(self, config: JudgeConfig):
        self.config = config

    def evaluate(self, dictionaries: Sequence[Dictionary], lm: LanguageModel) -> list[Any]:
        """Run the project's code on dictionaries of one model, and return a report for each.

        Raises:
            ConfigError: the project is not installed, or cannot judge one of the dictionaries.
        """
        raise ConfigError(f"{self.plugin_name} cannot be run from here; give sae(dictionary) to the project's own functions")

    def sae(self, dictionary: Dictionary) -> Any:
        """Return a dictionary as the object that the project's own functions take.

        Raises:
            ConfigError: the project cannot judge such a dictionary.
        """
        raise ConfigError(f"{self.plugin_name} takes no SAE object; call evaluate(dictionaries, lm)")


def judge(name: str, **options: Any) -> Judge:
    """Return the judge of that name, with its options.

    Raises:
        PluginError: there is no such judge.
        ConfigError: an option is unknown, is missing or has a bad value.
    """
    judge_class = registry.load(name, "judges")
    return judge_class(judge_class.Config(**options))
