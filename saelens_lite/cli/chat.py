"""Options of the commands that ask a chat model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from saelens_lite.cli.options import Flag, given
from saelens_lite.errors import ConfigError

if TYPE_CHECKING:
    from saelens_lite.chat import ChatModel


@dataclass(frozen=True)
class OfChat:
    """The chat model that is asked, and its limits.

    Parameters
    ----------
    model
        Name of the chat model, such as gpt-4o-mini; with --local, "tiny", a Hugging Face Hub id, or a folder.
    base_url
        Address of a server that speaks the OpenAI protocol, such as http://localhost:8000/v1; default: the environment
        variable OPENAI_BASE_URL, or else OpenAI's.
    key_variable
        Environment variable that holds the key, or the key's name in the keyring; default: OPENAI_API_KEY, which is then sent
        to the server of --base-url too.
    local
        Run the chat model on this computer, with transformers.
    concurrency
        Most questions at the same time; default: 8.
    timeout
        Seconds to wait for an answer before it is asked again; default: 120. Raise it for a slow server.
    input_price
        Price of a million input tokens in US dollars.
    output_price
        Price of a million output tokens in US dollars.
    dollar_limit
        Most US dollars to spend, as well as that can be estimated; needs the prices.
    token_limit
        Most tokens to spend, input and output together, as well as that can be estimated.
    ask_again
        Ask, and pay, again where the kept answer is a refusal, cut or empty.
    answers
        Folder of kept answers, so that a repeated command does not ask again; default: one in the folder for caches.
    """

    model: str | None = None
    base_url: str | None = None
    key_variable: str | None = None
    local: Flag = False
    concurrency: int | None = None
    timeout: float | None = None
    input_price: float | None = None
    output_price: float | None = None
    dollar_limit: float | None = None
    token_limit: int | None = None
    ask_again: Flag = False
    answers: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that were given, by their names in `ChatConfig`."""
        return given(
            base_url=self.base_url,
            key_variable=self.key_variable,
            concurrency=self.concurrency,
            timeout=self.timeout,
            input_price=self.input_price,
            output_price=self.output_price,
            dollar_limit=self.dollar_limit,
            token_limit=self.token_limit,
            ask_again=self.ask_again or None,
            folder=None if self.answers is None else str(self.answers),
        )

    def check(self) -> None:
        """Raise ConfigError if a setting is missing or has a bad value. Nothing is loaded or asked."""
        from saelens_lite.chat.settings import ChatConfig

        if self.model is None:
            raise ConfigError("no chat model: give --model, such as --model gpt-4o-mini")
        config = ChatConfig(model=self.model, **self.settings)
        if not self.local:
            config.resolved()
        elif useless := [name for name in self.settings if name not in ("folder", "ask_again")]:
            raise ConfigError(
                f"--{useless[0].replace('_', '-')} is for a server, and --local runs the model here; leave one out"
            )

    def load(self) -> "ChatModel":
        """Return the chat model."""
        import saelens_lite as sl

        self.check()
        if self.local:
            return sl.local_chat_model(self.model, folder=self.answers, ask_again=self.ask_again)
        return sl.chat_model(self.model, **self.settings)


ChatOptions = Annotated[OfChat, Parameter(name="*")]
NO_CHAT = OfChat()
