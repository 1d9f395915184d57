# SPDX-License-Identifier: Apache-2.0
"""One server with a catalogue of deltas, behind an API key."""

import concurrent.futures
import json
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.catalogue import BAD, fill
from transformers import AutoTokenizer

from benchmarks.serving.server import metric
from dqrelo_tools import cli

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

BIN = Path(sys.executable).parent
KEY = "secret"
PATIENCE_S = 120  # with a busy machine


@pytest.fixture(scope="module")
def store(family, own, tmp_path_factory):
    """A catalogue of good and bad deltas."""
    root = tmp_path_factory.mktemp("store")
    fill(root, family, own)
    return root


@pytest.fixture(scope="module")
def url(family, store, server, tmp_path_factory):
    command = [BIN / "dqrelo", "serve", family("llama").base, "--delta-dir", store]
    command += ["--served-model-name", "base", "--api-key", KEY, "--delta-endpoints"]
    command += ["--max-loras", "2", "--additional-config"]
    command += ['{"dqrelo": {"delta_memory_gib": 0.001}}']
    # Any class will do: the option is the user's, not this plugin's.
    command += ["--worker-extension-cls", "argparse.Namespace"]
    with server(command, tmp_path_factory.mktemp("log") / "log") as address:
        yield address


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def post(url, path, **body):
    """The parsed answer; raises HTTPError."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    data = json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data, headers)) as a:
        text = a.read()
        return json.loads(text) if text.startswith(b"{") else text.decode()


def chat(client, own, model="own", **options):
    return client.chat.completions.create(model=model, messages=own.chat, **options)


def words(tokens, shift=100):
    return " ".join(f"w{(token + shift) % 320}" for token in tokens)


def test_each_model_is_itself(url, client, own, family):
    """Prompt, defaults, stop and text of a delta are the fine-tune's own."""
    answer = chat(client, own, extra_body={"return_token_ids": True})
    assert answer.prompt_token_ids == own.prompt
    assert answer.choices[0].token_ids == own.answer
    assert answer.choices[0].message.content.strip() == words(own.answer[:-1])
    assert answer.choices[0].finish_reason == "stop"
    ids = {"return_token_ids": True}
    stream = chat(client, own, stream=True, extra_body=ids)
    parts = [part.choices[0] for part in stream]
    text = "".join(part.delta.content or "" for part in parts)
    assert text == answer.choices[0].message.content
    assert tokens_of(parts) == own.answer and parts[-1].finish_reason == "stop"

    tokens = post(url, "/tokenize", model="own", messages=own.chat)["tokens"]
    assert tokens == own.prompt
    text = post(url, "/detokenize", model="own", tokens=own.answer)["prompt"]
    assert text == words(own.answer)
    response = client.responses.create(model="own", input=own.chat[0]["content"])
    assert response.output_text.strip() == words(own.answer[:-1])

    prompt = words(own.prompt)
    whole = client.completions.create(
        model="own", prompt=prompt, logprobs=1, extra_body={"return_token_ids": True}
    ).choices[0]
    assert whole.prompt_token_ids == own.prompt and whole.token_ids == own.answer
    assert whole.logprobs.tokens == words(own.answer).split()
    pieces = client.completions.create(model="own", prompt=prompt, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.text
    cut = client.completions.create(model="own", prompt=prompt, max_tokens=2)
    assert cut.choices[0].text.strip() == words(own.answer[:2])
    stop = words(own.answer[2:3])
    cut = client.completions.create(model="own", prompt=prompt, stop=[stop])
    assert cut.choices[0].text.strip() == words(own.answer[:2])

    tokenizer = AutoTokenizer.from_pretrained(family("llama").base)
    ids = tokenizer.apply_chat_template(own.chat)["input_ids"]
    for model in ("base", "plain"):
        got = chat(
            client, own, model, max_tokens=20, extra_body={"return_token_ids": True}
        )
        assert got.prompt_token_ids == ids
        choice = got.choices[0]
        assert choice.message.content.strip() == words(choice.token_ids, shift=0)
        assert len(got.choices[0].token_ids) == 20


def test_models_at_the_same_time(client, own):
    names = ["own", "base", "plain"] * 6
    greedy = {"temperature": 0, "max_tokens": 12}
    alone = {name: chat(client, own, name, **greedy) for name in set(names)}
    texts = {n: answer.choices[0].message.content for n, answer in alone.items()}
    assert len(set(texts.values())) == 3
    with concurrent.futures.ThreadPoolExecutor(18) as pool:
        answers = pool.map(lambda name: chat(client, own, name, **greedy), names)
    for name, answer in zip(names, answers, strict=True):
        assert answer.choices[0].message.content == texts[name], name


def test_what_vllm_does_with_the_base_s_tokens_is_refused(url, client, own):
    shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}
    with pytest.raises(openai.BadRequestError, match="structured_outputs is not avail"):
        chat(client, own, response_format=shape)
    scoring = {"query": "w1", "items": ["w2"], "label_token_ids": [3, 4]}
    with pytest.raises(urllib.error.HTTPError) as error:
        post(url, "/generative_scoring", model="own", **scoring)
    assert b"which this route does not know" in error.value.read()


def test_the_list_of_models(client, store, family):
    cards = {card.id: card for card in client.models.list()}
    assert {"base", "own", "plain"} <= cards.keys()
    assert not {"notes", "link"} & cards.keys()
    config = json.loads((store / "plain" / "delta_config.json").read_text())
    weights = store / "plain" / "delta_model.safetensors"
    card = cards["plain"]
    assert card.parent == "base" and card.max_model_len == 128
    assert (card.digest, card.ratio) == (config["digest"], config["ratio"])
    assert card.size == weights.stat().st_size
    written = (store / "plain" / "delta_config.json").stat().st_mtime
    assert card.created == int(written)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("foreign", openai.BadRequestError, "belongs to another base"),
        ("flipped", openai.BadRequestError, "was changed after it was written"),
        ("link", openai.BadRequestError, "is a link to"),
        ("wordless", openai.BadRequestError, "a tokenizer that cannot be used"),
        ("notes", openai.NotFoundError, "notes"),
        ("../store/plain", openai.NotFoundError, "does not exist"),
        ("nobody", openai.NotFoundError, "does not exist"),
    ],
)
def test_what_cannot_be_served_says_why(client, own, name, error, message):
    for _ in range(2):
        with pytest.raises(error, match=message):
            chat(client, own, name)
    assert chat(client, own).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", BAD)
def test_a_delta_cannot_stop_the_server(client, own, name):
    """It is refused within seconds, by file and key, and all others go on."""
    file, _, reason = BAD[name]
    for options in ({}, {"extra_body": {"min_tokens": 3}}):
        with pytest.raises(
            openai.BadRequestError, match=f"(?s){name}.*{file}.*{reason}"
        ):
            chat(client, own, name, timeout=PATIENCE_S, **options)
    for model in ("base", "own"):
        answer = chat(client, own, model, max_tokens=3, timeout=PATIENCE_S)
        assert answer.usage.completion_tokens == 3
    cards = {card.id for card in client.models.list()}
    assert "own" in cards and "no-text" not in str(cards)


def test_a_tokenizer_that_fails_on_an_answer_fails_that_request(client, own):
    """In the task of vLLM that makes text of all models' tokens."""
    for options in ({}, {"stream": True}):
        with pytest.raises(openai.APIError, match="of padded fails on its answer"):
            list(chat(client, own, "padded", logprobs=True, top_logprobs=20, **options))
    assert chat(client, own, "padded", max_tokens=3).usage.completion_tokens == 3
    for model in ("base", "own"):
        answer = chat(client, own, model, max_tokens=3, timeout=PATIENCE_S)
        assert answer.usage.completion_tokens == 3


def test_tokens_that_end_an_answer_hold_back_for_min_tokens(client, own):
    answer = chat(client, own, extra_body={"min_tokens": 12, "return_token_ids": True})
    assert len(answer.choices[0].token_ids) == 12
    assert not {own.answer[-1], 319} & {*answer.choices[0].token_ids}


def test_the_404_names_the_models_that_there_are(url, client, own):
    """On every route, also for names that no folder can have."""
    there = r"does not exist\. Valid models: base, flipped, .*own, .* and \d+ more\."
    with pytest.raises(openai.NotFoundError, match=there):
        chat(client, own, "nobody")
    for path, body in (
        ("/v1/completions", {"prompt": "w1"}),
        ("/v1/responses", {"input": "w1"}),
        ("/tokenize", {"prompt": "w1"}),
        ("/v1/dqrelo/deltas/nobody/load", {}),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            post(url, path, model="nobody", **body)
        assert error.value.code == 404
        assert re.search(there, error.value.read().decode())
    for name in ("x" * 100_000, "a\0b", "\u202e", "../x", "no-text-\ufffd"):
        with pytest.raises(openai.NotFoundError, match=there) as found:
            chat(client, own, name)
        assert len(str(found.value)) < 1500
    for name in ("\ud800", 5, ["own"]):
        with pytest.raises(urllib.error.HTTPError) as error:
            post(url, "/v1/chat/completions", model=name, messages=own.chat)
        assert error.value.code == 400
    loads = [("x", p) for p in ("\0", "x" * 100_000, "/dev/zero", "/proc/self/fd/0")]
    loads += [("x" * 100_000, "own"), ("\ud800", "own"), ("x", "\ud800")]
    for name, path in loads:
        with pytest.raises(urllib.error.HTTPError) as error:
            post(url, "/v1/load_lora_adapter", lora_name=name, lora_path=path)
        assert error.value.code == 400
    assert chat(client, own).choices[0].finish_reason == "stop"


def test_a_delta_comes_and_goes(url, client, own, store, family):
    with pytest.raises(openai.NotFoundError):
        chat(client, own, "late")
    shutil.copytree(family("llama").deltas[2], store / "late")
    assert chat(client, own, "late", max_tokens=2).model == "late"
    # Its memory is free after it was unloaded; a stream in flight ends first.
    options = {"return_token_ids": True, "ignore_eos": True}
    stream = chat(client, own, "late", max_tokens=60, stream=True, extra_body=options)
    first = next(stream)
    assert "late" in post(url, "/v1/unload_lora_adapter", lora_name="late")
    parts = [part.choices[0] for part in (first, *stream)]
    assert len(tokens_of(parts)) == 60 and parts[-1].finish_reason == "length"
    assert tiers(url)["late"] == "disk"
    shutil.rmtree(store / "late")
    with pytest.raises(openai.NotFoundError):
        chat(client, own, "late")
    assert "late" not in {card.id for card in client.models.list()}


def tokens_of(parts):
    """The tokens of a stream; a busy server puts several of them into one part."""
    tokens = (getattr(part, "token_ids", None) for part in parts)  # the first has none
    return [token for some in tokens for token in some or []]


def test_only_folders_of_the_catalogue_are_loaded_by_path(url, store, family):
    inside, outside = store / "plain", family("llama").deltas[2]
    assert "Success" in post(
        url, "/v1/load_lora_adapter", lora_name="alias", lora_path=str(inside)
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        post(url, "/v1/load_lora_adapter", lora_name="x", lora_path=str(outside))
    assert error.value.code == 400 and b"must not be loaded" in error.value.read()
    with pytest.raises(urllib.error.HTTPError) as error:
        post(url, "/v1/load_lora_adapter", lora_name="x", lora_path=str(store / "x"))
    assert error.value.code == 404
    post(url, "/v1/unload_lora_adapter", lora_name="alias")


def test_metrics(url, client, own):
    """Those of the engine's process are in the API server's /metrics."""

    def sample(name, **labels):
        return metric(url, f"dqrelo:{name}", **labels)

    def counts():
        return [
            sample("requests_total", model="own", finished_reason="length"),
            sample("generation_tokens_total", model="own"),
            sample("prompt_tokens_total", model="own"),
            sample("cold_wait_seconds_count"),
        ]

    chat(client, own)
    post(url, "/v1/dqrelo/deltas/own/unload")
    # What the engine reports of a step, it reports of all before it.
    of_base = {"model": "base", "finished_reason": "length"}
    done = sample("requests_total", **of_base)
    chat(client, own, "base", max_tokens=2)
    assert eventually(lambda: sample("requests_total", **of_base) > done)
    before, registered = counts(), sample("num_deltas_registered")
    for _ in range(3):
        chat(client, own, max_tokens=2)
    counted = [3, 6, 3 * len(own.prompt), 1]
    expected = [a + b for a, b in zip(before, counted, strict=True)]
    assert eventually(lambda: counts() == expected)
    assert eventually(lambda: sample("num_deltas_registered") == registered + 1)
    assert sample("delta_bytes", tier="device") > 0
    post(url, "/v1/dqrelo/deltas/own/unload")
    assert eventually(lambda: sample("num_deltas_registered") == registered)


def test_a_gateway_sees_which_deltas_run_and_wait(url, client, own, store):
    """By the metric of vLLM that gateways read, under the name that clients give.

    20 answers to one request are more than --max-num-seqs: some of them wait.
    """
    path = str(store / "own")
    post(url, "/v1/load_lora_adapter", lora_name="routed", lora_path=path)
    before = {state[1:] for state in adapters(url)}
    endless = {"ignore_eos": True}
    options = {"n": 20, "temperature": 1, "max_tokens": 60, "extra_body": endless}
    stream = chat(client, own, "routed", stream=True, **options)
    next(stream)
    routed = ("routed", "routed")  # running, waiting
    assert {state[1:] for state in adapters(url)} - before == {routed}
    assert len({part.choices[0].index for part in stream if part.choices}) == 20
    # Later states have later values: at last nothing runs.
    assert eventually(lambda: max(adapters(url))[1:] == ("", ""))
    post(url, "/v1/unload_lora_adapter", lora_name="routed")


def adapters(url):
    """(time, running, waiting) of vllm:lora_requests_info, one for each state."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return [
        (s.value, s.labels["running_lora_adapters"], s.labels["waiting_lora_adapters"])
        for family in families
        for s in family.samples
        if s.name == "vllm:lora_requests_info"
    ]


def eventually(condition):
    """Whether it holds before long: an engine reports what changed after it answers."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def tiers(url):
    request = urllib.request.Request(
        f"{url}/v1/dqrelo/deltas", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request) as answer:
        return {one["id"]: one["tier"] for one in json.load(answer)["data"]}


def test_the_command(url, store, capsys):
    def deltas(*arguments, key=KEY):
        options = ["--url", url, *(["--api-key", key] if key else [])]
        code = cli.main(["deltas", *arguments, *options])
        return code, capsys.readouterr()

    assert deltas("unload", "plain")[0] in (0, 1)  # whether it was used before
    for option in ([], ["--load-inplace"]):
        code, said = deltas("load", "plain", *option)
    assert code == 0 and said.out == "plain is now on host\n"
    code, said = deltas("list")
    (line,) = [line for line in said.out.splitlines() if line.startswith("plain")]
    config = json.loads((store / "plain" / "delta_config.json").read_text())
    assert line.split()[1] == "host" and line.endswith(config["digest"][7:19])
    code, said = deltas("list", "--json")
    listed = {one["id"]: one for one in json.loads(said.out)}
    assert listed["plain"]["bytes_in_memory"] > 0 and not listed["plain"]["running"]
    code, said = deltas("unload", "plain")
    assert code == 0 and said.out == "plain is now on disk\n"
    assert tiers(url)["plain"] == "disk"

    for arguments, message in [
        (("load", "foreign"), "belongs to another base"),
        (("load", "nobody"), "The model `nobody` does not exist. Valid models: base,"),
        (("unload", "plain"), "plain"),
        (("pin", "nobody"), "The model `nobody` does not exist. Valid models: base,"),
        (("load",), "takes the NAME"),
        (("list", "plain"), "does not take a NAME"),
        (("pin", "plain", "--load-inplace"), "does not take --load-inplace"),
    ]:
        code, said = deltas(*arguments)
        assert code == 1 and message in said.err and not said.out
    assert deltas("pin", "plain")[0] == 0
    listed = {one["id"]: one for one in json.loads(deltas("list", "--json")[1].out)}
    assert listed["plain"]["pinned"]
    code, said = deltas("list", key="wrong")
    assert code == 1 and "VLLM_API_KEY" in said.err
