"""Options of the commands that ask a chat model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
        Name of the chat model, such as gpt-4o-mini; with --local, a Hugging Face Hub id or a folder.
    base_url
        Address of a server that speaks the OpenAI protocol, such as http://localhost:8000/v1; default: OpenAI's.
    local
        Run the chat model here, with transformers.
    concurrency
        Questions that are asked at the same time.
    max_dollars
        Stop before more is spent. It needs known prices.
    max_tokens
        Stop before more tokens are read and written in all.
    replies
        Folder in which answers are kept, so that a repeated command does not ask again; default: one in the user's cache.
    """

    model: str | None = None
    base_url: str | None = None
    local: Flag = False
    concurrency: int | None = None
    max_dollars: float | None = None
    max_tokens: int | None = None
    replies: Path | None = None

    def check(self) -> None:
        """Raise ConfigError if the options do not go together. Nothing is loaded."""
        if self.model is None:
            raise ConfigError("no chat model: give --model, such as --model gpt-4o-mini")
        if self.local and self.base_url is not None:
            raise ConfigError("--local runs the model here, and --base-url names a server; give one of them")

    def load(self) -> "ChatModel":
        """Return the chat model."""
        import saelens_lite as sl

        self.check()
        settings = given(
            concurrency=self.concurrency, max_dollars=self.max_dollars, max_tokens=self.max_tokens, replies=self.replies
        )
        if self.local:
            return sl.local_chat_model(self.model, **settings)
        return sl.chat_model(self.model, base_url=self.base_url, **settings)


ChatOptions = Annotated[OfChat, Parameter(name="*")]
NO_CHAT = OfChat()
