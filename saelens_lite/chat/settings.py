"""The settings of a chat model, and the key of its endpoint, which comes from the environment or the keyring alone."""

import ipaddress
import os
import re
from contextlib import suppress
from pathlib import PurePath
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from saelens_lite.config import MOST, FrozenConfig
from saelens_lite.errors import ChatAccessError, ConfigError

OPENAI = "https://api.openai.com/v1"
ADDRESS_VARIABLE = "OPENAI_BASE_URL"
KEY_VARIABLE = "OPENAI_API_KEY"
MOST_CHARACTERS = 2000  # of an address
SERVICE = "saelens_lite"  # in the keyring
NO_KEY = "none"  # sent to a server of this computer, which needs no key


class ChatConfig(FrozenConfig):
    """Settings of a chat model behind an endpoint that speaks OpenAI's chat/completions."""

    model: str = Field(min_length=1, description="Name of the model at the endpoint, such as gpt-4o-mini.")
    base_url: str | None = Field(
        None,
        description="Address of the endpoint, such as http://localhost:8000/v1; default: the environment variable "
        "OPENAI_BASE_URL if it is not empty, or else OpenAI's.",
    )
    key_variable: str = Field(
        KEY_VARIABLE,
        min_length=1,
        description="Environment variable that holds the key, which is sent to the endpoint, whichever that is. If it is not "
        "set, the keyring is asked for the password of this name in the service saelens_lite. A server of this computer needs "
        "no key.",
    )
    concurrency: int = Field(
        8,
        ge=1,
        le=1000,
        description="Most requests at the same time. A server that is too slow for so many gets fewer after a time-out.",
    )
    retries: int = Field(
        6, ge=0, le=100, description="Times that a request is repeated after a fault of the server or network."
    )
    backoff: float = Field(
        1.0, ge=0, description="Seconds before the first repetition; each later wait is twice as long, and all of them vary."
    )
    longest_wait: float = Field(
        120.0, ge=0, description="Longest wait in seconds. If the server demands a longer one, the call ends with an error."
    )
    timeout: float = Field(120.0, gt=0, description="Seconds after which a request without a whole reply counts as lost.")
    temperature: float = Field(0.0, ge=0, description="Temperature of the draws; 0 takes the likeliest token each time.")
    seed: int | None = Field(0, ge=0, lt=2**31, description="Seed that is sent with each request; None: no seed.")
    structured: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Structured output: auto asks for it and does without if the server refuses, on takes the refusal as an "
        "error, off does not ask.",
    )
    input_price: float | None = Field(None, ge=0, description="Price of a million input tokens in US dollars.")
    output_price: float | None = Field(None, ge=0, description="Price of a million output tokens in US dollars.")
    dollar_limit: float | None = Field(
        None,
        ge=0,
        description="Most US dollars that this chat model may spend, as well as that can be estimated; needs the prices.",
    )
    token_limit: int | None = Field(
        None,
        ge=0,
        le=MOST,
        description="Most tokens that this chat model may spend, input and output together, as well as that can be estimated.",
    )
    folder: str | None = Field(
        None,
        description="Folder of kept answers; default: the environment variable SAELENS_LITE_ANSWERS, or else "
        "saelens_lite/answers in the folder of the system for caches.",
    )
    ask_again: bool = Field(False, description="Ask again, and pay again, where the kept answer is refused, cut or empty.")

    @field_validator("folder", mode="before")
    @classmethod
    def _as_text(cls, folder: Any) -> Any:
        return str(folder) if isinstance(folder, PurePath) else folder

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, address: str | None) -> str | None:
        return address if address is None else checked_address(address)

    @model_validator(mode="after")
    def _limit_needs_prices(self) -> "ChatConfig":
        if self.dollar_limit is not None and (self.input_price is None or self.output_price is None):
            raise ConfigError("dollar_limit needs input_price and output_price")  # pydantic's error would show all settings
        return self

    def resolved(self) -> "ChatConfig":
        """Return the settings with the address of the endpoint.

        Raises:
            ConfigError: the address in OPENAI_BASE_URL is not one, or holds a name or password.
        """
        address = self.base_url
        if address is None and (address := os.environ.get(ADDRESS_VARIABLE) or None):
            address = checked_address(address, f"the environment variable {ADDRESS_VARIABLE}")
        return ChatConfig(**self.model_dump(exclude_unset=True) | {"base_url": (address or OPENAI).rstrip("/")})


def checked_address(address: str, name: str = "base_url") -> str:
    """Return an address after checking it. An error never shows it, since somebody may have put a key into it.

    Raises:
        ConfigError: the address is not one, or holds a name or password.
    """
    expected = "expected an address such as http://localhost:8000/v1"
    if not address:
        raise ConfigError(f"{name} is empty; {expected}, or nothing at all for OpenAI's")
    if len(address) > MOST_CHARACTERS or not re.fullmatch(r"[!-~]+", address):
        raise ConfigError(f"{name} is too long, or has spaces or other characters that no address has; {expected}")
    if "@" in address or "?" in address or "#" in address:
        raise ConfigError(
            f"{name}: expected an address without a name, password, query or fragment; the key comes from an environment "
            "variable or the keyring"
        )
    try:
        parts = urlsplit(address)
        has_host, port = _is_host(parts.hostname or ""), parts.port
    except ValueError:  # a bracket that is not closed, a port that is not a number
        has_host, port, parts = False, None, urlsplit("")
    if parts.scheme not in ("http", "https") or not has_host or port == 0:
        raise ConfigError(f"{name} is no address of a server: {expected}, with http or https, and a port from 1 to 65535")
    return address


def _is_host(host: str) -> bool:
    """Return whether a text is an IP address or can be a name. Raise ValueError for an IP address that is not one."""
    if ":" in host or re.fullmatch(r"[\d.]+", host):
        return bool(ipaddress.ip_address(host))
    return all(re.fullmatch(r"[\w-]{1,63}", label) for label in host.removesuffix(".").split("."))


def is_loopback(address: str) -> bool:
    """Return whether an address is one of this computer."""
    host = urlsplit(address).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_of(config: ChatConfig) -> str:
    """Return the key of the endpoint, from the environment, or else from the keyring if that package is installed.

    Raises:
        ChatAccessError: there is no key, and the endpoint is on another computer; or the key cannot be sent.
    """
    name = config.key_variable
    if key := os.environ.get(name, "").strip() or _from_keyring(name):
        if not re.fullmatch(r"[ -~]+", key):
            raise ChatAccessError(
                f"the key in {name} has characters that no key has, such as a line end or a letter with an accent; set it again"
            )
        return key
    if is_loopback(config.base_url or OPENAI):
        return NO_KEY
    raise ChatAccessError(
        f"no key for {config.base_url or OPENAI}: set the environment variable {name} (to any word if the server needs no "
        f"key), or store the key with `keyring set {SERVICE} {name}`"
    )


def _from_keyring(name: str) -> str | None:
    """Return a password of the keyring; None if the package or a backend is missing, or the keyring stays locked."""
    with suppress(Exception):  # each backend raises errors of its own
        import keyring

        return (keyring.get_password(SERVICE, name) or "").strip() or None
    return None
