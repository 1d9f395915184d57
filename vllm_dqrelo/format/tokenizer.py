# SPDX-License-Identifier: Apache-2.0
"""A tokenizer and its chat templates, tried before anything uses them."""

import reprlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.sandbox import SANDBOX, SandboxError
from vllm_dqrelo.format.side_files import TOKENIZER_FILES

MOST_BYTES = 256 * 2**20  # of one of its files
# Characters of a chat template, of which published ones have thousands: vLLM parses it
# in the loop that answers all requests.
MOST_TEMPLATE = 2**18
TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
# Templates may refuse a conversation; what else keeps one from being rendered keeps
# every conversation from it.
BROKEN = {"Limit", "RecursionError", "SyntaxError"}
BROKEN |= {"TemplateAssertionError", "TemplateSyntaxError"}
SHORT = [{"role": "user", "content": "Hello"}]
LONG = [
    {"role": "system", "content": "Be brief."},
    *({"role": role, "content": "Hello"} for role in ("user", "assistant", "user")),
]


@contextmanager
def folder_of(files: dict[str, bytes], base: Path) -> Iterator[Path]:
    """A folder of these files, by name, with the config.json of ``base``.

    It says which class a tokenizer has, and is there for the block only.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        shutil.copy(base / "config.json", folder)
        yield folder


def try_tokenizer(folder: Path, where: Path) -> int | None:
    """Load the tokenizer of ``folder`` in a sandbox, and render its chat templates.

    Args:
        folder: has its files, and the config.json of its model.
        where: what to call the folder.

    Returns:
        Its highest token; None where transformers is not installed.

    Raises:
        DqreloError: it cannot be used.
    """
    try:
        names = [name for name in TOKENIZER_FILES if name.endswith(".json")]
        loaded = SANDBOX.run("load", str(folder), names)
    except SandboxError as error:
        if error.kind == "ModuleNotFoundError" and "transformers" in str(error):
            return None
        reason = str(error).replace(str(folder), str(where))
        if "trust_remote_code" in reason:
            reason = "it needs code of its own, which a delta cannot bring"
        raise DqreloError(
            f"{where} has a tokenizer that cannot be used: {reason}. Repair it, or "
            f"remove all of its files ({', '.join(TOKENIZER_FILES)}) to use the base's"
        ) from error
    file = TEMPLATE_FILE if (folder / TEMPLATE_FILE).is_file() else CONFIG_FILE
    try_templates(loaded["templates"], loaded["tokens"], where / file)
    return loaded["highest"]


def try_templates(templates: Any, tokens: dict[str, Any], where: Path) -> None:
    """Compile and render each chat template; a DqreloError for one that fails.

    Args:
        templates: one, several by name, or None.
        tokens: special tokens, for it to name.
        where: the file that they are in.
    """
    named = templates if isinstance(templates, dict) else {"default": templates}
    for name, template in named.items():
        if template is None:
            continue
        if not isinstance(template, str):
            raise DqreloError(
                f"{where} cannot be used: chat_template is {reprlib.repr(template)}; "
                "expected a text"
            )
        if len(template) > MOST_TEMPLATE:
            raise DqreloError(
                f"{where} cannot be used: chat_template ({name}) has "
                f"{len(template):,} characters; expected at most {MOST_TEMPLATE:,}"
            )
        for conversation in (SHORT, LONG):
            options = {"add_generation_prompt": True, **tokens}
            try:
                SANDBOX.run("render", template, conversation, options)
            except SandboxError as error:
                if error.kind in BROKEN:
                    raise DqreloError(
                        f"{where} cannot be used: chat_template ({name}) fails: {error}"
                    ) from error
