# SPDX-License-Identifier: Apache-2.0
"""Jobs that hang, crash or take all memory, and those beside and after them."""

import threading

import pytest

from vllm_dqrelo.format import sandbox
from vllm_dqrelo.format.sandbox import Sandbox, SandboxError

CHAT = [{"role": "user", "content": "hello"}]
SOUND = "{{ messages[0].content }}"
LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.fixture
def box():
    """A sandbox; its processes end with it."""
    made = Sandbox()
    yield made
    while not made._idle.empty():
        made._idle.get().kill()


@pytest.mark.parametrize(
    ("template", "kind", "message"),
    [
        (LOOP, "Limit", "more time than is allowed"),
        ("{{ 'a' * 10 ** 11 }}", "Limit", "bytes of memory"),
        ("{{ 'a' * 10 ** 7 }}", "Limit", "gives more than 1,000,000"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError", "depth"),
        ("{{ raise_exception('x' * 10 ** 6) }}", "TemplateError", "^x{4000}$"),
        ("{% if %}", "TemplateSyntaxError", "Expected an expression"),
    ],
)
def test_a_job_that_fails_leaves_the_next_one_alone(
    box, monkeypatch, template, kind, message
):
    monkeypatch.setattr(sandbox, "MOST_REPLY", 10**6)
    with pytest.raises(SandboxError, match=message) as error:
        box.run("render", template, CHAT, {})
    assert error.value.kind == kind
    assert box.run("render", SOUND, CHAT, {}) == "hello"


def test_a_job_that_hangs_holds_up_no_other(box, monkeypatch):
    monkeypatch.setitem(sandbox.CPU_SECONDS, "render", 60)
    assert box.run("render", SOUND, CHAT, {}) == "hello"
    (process,) = box._idle.queue
    failed = []

    def hang():
        try:
            box.run("render", LOOP, CHAT, {})
        except SandboxError as error:
            failed.append(str(error))

    thread = threading.Thread(target=hang)
    thread.start()
    while not box._idle.empty():
        pass
    assert box.run("render", SOUND, CHAT, {}) == "hello"
    assert thread.is_alive()
    process.kill()
    thread.join()
    assert failed == ["it ended its process (exit code -9)"]
    assert box.run("render", SOUND, CHAT, {}) == "hello"


def test_a_process_that_the_system_ended_is_replaced(box):
    assert box.run("render", SOUND, CHAT, {}) == "hello"
    (process,) = box._idle.queue
    process.kill()
    process.wait()
    assert box.run("render", SOUND, CHAT, {}) == "hello"


def test_a_tokenizer_is_loaded_and_used(box, tmp_path, save_model):
    save_model("llama-tied", tmp_path, seed=1)
    assert box.run("load", str(tmp_path), [])["highest"] == 319
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SandboxError, match="tokenizer.json is not valid JSON"):
        box.run("load", str(tmp_path), ["tokenizer.json"])
