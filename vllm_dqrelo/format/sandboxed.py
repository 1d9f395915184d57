# SPDX-License-Identifier: Apache-2.0
"""What runs in the processes of ``sandbox.py``: this file is their script.

A line of JSON comes in, [job, seconds of CPU time, arguments], and one goes out, [name
of the error or "", result or message]. Nothing here imports torch, which takes seconds.
"""

import importlib
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

NEEDED = ["tokenizers.decoders", "transformers.models.auto.tokenization_auto"]
NEEDED += ["transformers.utils.chat_template_utils"]
MOST_MESSAGE = 4000  # characters of an error
TEXT = "Hello, world! 你好 0123 \n\t <|im_start|>"


def load(folder: str, names: list[str]) -> dict[str, Any]:
    """Load a tokenizer, and use it once as vLLM will.

    Args:
        folder: where its files are.
        names: of those of its files that must be JSON objects, if they are there.

    Returns:
        Its highest token, its chat template or templates, and its special tokens.
    """
    from tokenizers.decoders import DecodeStream
    from transformers import AutoTokenizer

    for path in filter(Path.is_file, map(Path(folder).joinpath, names)):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a JSON object")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.decode(tokenizer.encode(TEXT))
    tokens = tokenizer.get_vocab().values()
    if native := getattr(tokenizer, "_tokenizer", None):
        for token in tokens:
            DecodeStream(skip_special_tokens=False).step(native, token)
    return {
        "highest": max(tokens),
        "templates": tokenizer.chat_template,
        "tokens": {k: text_of(v) for k, v in tokenizer.special_tokens_map.items()},
    }


def text_of(token: Any) -> Any:
    """A special token, or several, as text."""
    return [*map(str, token)] if isinstance(token, list) else str(token)


def render(chat_template: str, conversation: Any, options: dict[str, Any]) -> str:
    """Render a conversation as transformers does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(
        [conversation], chat_template=chat_template, **options
    )
    return rendered[0]


def limit_time(seconds: int) -> None:
    """Let the system end this process when a job has taken so much of the CPU."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    used = math.ceil(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, most))


def limit_memory(size: int) -> None:
    """Let it have so many bytes more than it has, where the system can tell."""
    if (statm := Path("/proc/self/statm")).exists():
        pages = int(statm.read_text().split()[0])
        most = pages * resource.getpagesize() + size
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Do jobs until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of who started it
    # Discard the output of jobs.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: (
        None if name == "torch" else find(name, package)
    )
    with suppress(ModuleNotFoundError):  # the jobs will say so
        for name in NEEDED:  # before their time is counted
            importlib.import_module(name)
    memory, most = map(int, sys.argv[1:])
    limit_memory(memory)
    jobs = {job.__name__: job for job in (load, render)}
    for line in sys.stdin:
        job, seconds, arguments = json.loads(line)
        limit_time(seconds)
        try:
            reply = json.dumps(["", jobs[job](*arguments)])
            if len(reply) > most:
                reply = json.dumps(["Limit", f"it gives more than {most:,} bytes"])
        except BaseException as error:  # a panic of native code is not an Exception
            message = str(error)[:MOST_MESSAGE]
            reply = json.dumps([type(error).__name__, message])
        replies.write(reply + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
