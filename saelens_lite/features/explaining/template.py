"""Templates of questions: files with a version, which may be a user's own."""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from saelens_lite.errors import ConfigError
from saelens_lite.features.explaining.quoting import block
from saelens_lite.files import named_file, open_file

MOST_BYTES = 1 << 20


class Template(NamedTuple):
    """A template of Jinja with the blocks `system`, which may be missing, and `user`. `version` is that of its words."""

    text: str
    version: str
    name: str

    @classmethod
    def read(cls, path: str | Path, *, own: bool = False) -> "Template":
        """Return the template in a file, whose first line says its version: {# version 1 #}.

        Args:
            own: it is a user's file; its version is then "template" and the beginning of the hash of its content.

        Raises:
            ConfigError: the file is missing, too large, not UTF-8 or not a template with a block `user`.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise ConfigError(f"template = {str(path)!r}: there is no such file")
        with open_file(named_file(path)) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(f"template = {str(path)!r}: the file is larger than {MOST_BYTES:,} bytes")
        try:
            text = content.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            raise ConfigError(f"template = {str(path)!r}: the file is not text in UTF-8") from None
        version = re.match(r"\{#\s*version (\S+)\s*#\}", text)
        if not own and version is None:
            raise ConfigError(f"{path} does not begin with its version; expected a first line such as {{# version 1 #}}")
        named = f"template {hashlib.sha256(content).hexdigest()[:12]}" if own else version[1]
        template = cls(text, named, str(path))
        if "user" not in _compiled(template).blocks:
            raise ConfigError(f"{path} has no block named user; expected {{% block user %}} … {{% endblock %}}")
        return template

    def render(self, **values: Any) -> tuple[str, str]:
        """Return the texts of the blocks `system` and `user`. The filter `block` writes lines of data as a fenced block.

        Raises:
            ConfigError: the template uses a name that it is not given.
        """
        from jinja2 import TemplateError

        template = _compiled(self)
        try:
            texts = {name: "".join(part(template.new_context(values))) for name, part in template.blocks.items()}
        except TemplateError as error:
            raise ConfigError(f"{self.name}: {error}; a template may use {', '.join(values)}") from None
        return texts.get("system", "").strip(), texts["user"].strip()


@cache
def _compiled(template: Template) -> Any:
    """Return Jinja's template. It runs in a sandbox, because the file may come from somebody else."""
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["block"] = block
    try:
        return environment.from_string(template.text)
    except TemplateError as error:
        raise ConfigError(f"{template.name} is not a template: {error}") from None
