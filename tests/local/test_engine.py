"""The embedded engine: llama-server's flags onto xllamacpp, and the process that serves with them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import xllamacpp

from llamesh.local.engine.command_line import ACTIONS, BY_NAME, FlagError, Request, help_text, read
from llamesh.local.engine.flag import Flag
from llamesh.local.engine.refused import REFUSED
from llamesh.local.engine.table import FLAGS
from tests.support.engine import EMBEDDED, serving, started
from tests.support.node import PATIENCE_SECONDS, POLL_SECONDS, clean_environment


@pytest.fixture
def command(tiny_model: Path) -> Any:
    """Reads a command line with a good model in front, and applies it: the request and its parameters."""

    def run(*argv: str, environ: dict[str, str] | None = None) -> tuple[Request, Any]:
        request = read(["-m", str(tiny_model), *argv], environ or {})
        params = xllamacpp.CommonParams()
        request.apply(params, xllamacpp)
        return request, params

    return run


def samples(flag: Flag, directory: Path, model: Path) -> str:
    """A value that the flag takes, by what its placeholder calls it."""
    (directory / "text").write_text("# comment\nroot ::= [a-z]\n")
    (directory / "schema").write_text('{"type": "object"}')
    by_name = {
        "--model": str(model),
        "--model-draft": str(model),
        "--json-schema": '{"type": "object"}',
        "--json-schema-file": str(directory / "schema"),
        "--chat-template-kwargs": '{"a": {"b": 1}}',
        "--grammar": 'root ::= "a"',
        "--lora": str(model),
        "--lora-scaled": f"{model}:0.5",
        "--numa": "isolate",
        "--pooling": "mean",
        "--load-mode": "mmap+mlock",
        "--lazy-mode": "off",
        "--spec-type": "ngram-mod,ngram-simple",
        "--reasoning-format": "deepseek-legacy",
        "--override-tensor": "blk=CPU",
        "--override-tensor-draft": "blk=CPU",
        "--dry-base": "1.5",
        "--samplers": "top-k;temp",
        "--sampler-seq": "kt",
    }
    by_placeholder = {
        "TYPE": "q8_0",
        "FILE": str(directory / "text"),
        "DIR": str(directory),
        "HEX": "0x0f",
        "LOW-HIGH": "0-3",
        "0..100": "50",
        "N0,N1,...": "3,1",
        "MIB0,...": "512",
        "N|auto|all": "all",
        "JSON": "{}",
        "PORT": "8081",
    }
    for name in flag.names:
        if name in by_name:
            return by_name[name]
    if flag.placeholder in by_placeholder:
        return by_placeholder[flag.placeholder]
    choices = flag.placeholder.split("|")
    return choices[-1] if len(choices) > 1 else "1"


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.names[0])
def test_every_row_of_the_table_reaches_the_binding(
    flag: Flag, command: Any, tmp_path: Path, tiny_model: Path
) -> None:
    for name in flag.names:
        request, _ = command(name, *([samples(flag, tmp_path, tiny_model)] if flag.convert else []))
        assert set(flag.paths) <= set(request.values)


def test_no_spelling_means_two_things() -> None:
    spellings = [name for flag in FLAGS for name in flag.names]
    assert len(spellings) == len(set(spellings)) == len(BY_NAME)
    assert not set(REFUSED) & set(BY_NAME)


def test_every_flag_of_the_engines_help_is_known(engine_binary: Path | None) -> None:
    """What --help lists, llama-server's own too, is in the table or refused with a reason."""
    command = EMBEDDED if engine_binary is None else [engine_binary]
    output = subprocess.run(
        [*command, "--help"], env=clean_environment({}), capture_output=True, text=True, check=True
    ).stdout
    # A flag stands at the start of its line, or a blank and a comma after another one.
    listed = set()
    for line in output.splitlines():
        while match := re.match(r" *(--?[A-Za-z][\w.-]*)(,|$| )", line):
            listed.add(match[1])
            line = line[match.end(1) :].removeprefix(",") if match[2] == "," else ""
    known = {*BY_NAME, *REFUSED, *ACTIONS, "-dt", "--defrag-thold"}
    assert len(listed) > 200
    assert listed - known == set()


def test_defaults_are_those_of_llama_server(command: Any) -> None:
    _, params = command()
    assert params.n_parallel == -1
    assert params.port == 8080
    assert params.hostnames == ["127.0.0.1"]
    assert params.default_template_kwargs == {"preserve_reasoning": "true"}
    assert params.fit_params_min_ctx == 4096
    assert params.sampling.user_sampling_config == 0


def test_plain_values_land_in_their_fields(command: Any) -> None:
    _, params = command(
        *("-c", "2048", "-np", "3", "-b", "64", "-ub", "32", "-ngl", "all", "-fa", "on", "-ctk", "q8_0"),
        *("--host", "127.0.0.1,::1", "--port", "9000", "--temp", "0.5", "--top_k", "7", "--no-mmap"),
        *("--rope-scale", "4", "-to", "12", "--no-perf", "--no-slots", "--log-disable", "-s", "-1"),
    )
    assert (params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch) == (2048, 3, 64, 32)
    assert params.n_gpu_layers == -2
    assert params.flash_attn_type == xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    assert params.cache_type_k == xllamacpp.ggml_type.GGML_TYPE_Q8_0
    assert params.hostnames == ["127.0.0.1", "::1"]
    assert params.port == 9000
    assert params.sampling.temp == 0.5
    assert params.sampling.top_k == 7
    assert params.load_mode == xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    assert params.rope_freq_scale == 0.25
    assert (params.timeout_read, params.timeout_write) == (12, 12)
    assert params.no_perf
    assert params.sampling.no_perf
    assert not params.endpoint_slots
    assert params.verbosity == -1
    assert params.sampling.seed == 2**32 - 1


def test_sampling_that_the_user_chose_is_marked(command: Any) -> None:
    _, params = command("--temp", "0.1", "--min-p", "0.2", "--presence-penalty", "1")
    bits = xllamacpp.common_params_sampling_config
    expected = bits.COMMON_PARAMS_SAMPLING_CONFIG_TEMP.value | bits.COMMON_PARAMS_SAMPLING_CONFIG_MIN_P.value
    assert params.sampling.user_sampling_config == expected


def test_a_context_of_zero_keeps_the_whole_context(command: Any) -> None:
    _, params = command("-c", "0")
    assert params.n_ctx == 0
    assert params.fit_params_min_ctx == -1


def test_flags_that_gather_add_up_and_others_keep_the_last(command: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# mine\nthird\n")
    request, params = command(
        *("--api-key", "first,second", "--api-key-file", str(keys), "-a", "x", "--alias", "y, z"),
        *("-C", "3", "-Cr", "4-5", "-ot", "one=CPU", "-cmoe", "-ncmoe", "1", "-r", r"a\n", "-r", "b"),
        *("-c", "1", "-c", "2", "--spec-default", "--spec-type", "ngram-simple"),
        environ={"LLAMA_API_KEY": "zeroth"},
    )
    assert params.api_keys == ["zeroth", "first", "second", "third"]
    assert params.model_alias == {"x", "y", "z"}
    assert [cpu for cpu, wanted in enumerate(params.cpuparams.cpumask) if wanted] == [0, 1, 4, 5]
    assert params.antiprompt == ["a\n", "b"]
    assert params.n_ctx == 2
    kinds = xllamacpp.common_speculative_type
    assert params.speculative.types[-2:] == [
        kinds.COMMON_SPECULATIVE_TYPE_NGRAM_MOD,
        kinds.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE,
    ]
    patterns = [entry.split("=")[0] for entry in request.values["tensor_buft_overrides"].entries]
    assert patterns[0] == "one"
    assert patterns[2].startswith("blk\\.0\\.ffn_")


def test_devices_share_as_told(command: Any) -> None:
    _, params = command("-ts", "3/1", "-fitt", "512")
    assert params.tensor_split[:3] == [3.0, 1.0, 0.0]
    assert set(params.fit_params_target) == {512 << 20}


def test_template_arguments_are_json_text(command: Any) -> None:
    _, params = command(
        *("--chat-template-kwargs", '{"a": [1, "x"]}', "-rea", "off", "--reasoning-effort", "low"),
        "--no-reasoning-preserve",
    )
    assert params.enable_reasoning == 0
    assert params.default_template_kwargs == {
        "a": '[1, "x"]',
        "enable_thinking": "false",
        "reasoning_effort": '"low"',
        "preserve_reasoning": "false",
    }


def test_rerank_means_embeddings_with_rank_pooling(command: Any) -> None:
    _, params = command("--rerank")
    assert params.embedding
    assert params.pooling_type == xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-c", "many"], "bad value 'many' for -c: expected a whole number"),
        (["-c", "12abc"], "bad value '12abc' for -c"),
        (["-c", "-5"], "bad value '-5' for -c: expected a whole number, 0 or more"),
        (["--port", "70000"], "expected a whole number, from 0 to 65535"),
        (["-np", "0"], "bad value '0' for -np: expected a number of slots, or -1 for auto"),
        (["--temp", "nan"], "bad value 'nan' for --temp: expected a finite number"),
        (["--repeat-penalty", "0"], "more than 0"),
        (["-fa", "perhaps"], "bad value 'perhaps' for -fa: expected one of on, "),
        (["-ctk", "q9"], "bad value 'q9' for -ctk: expected one of f32, f16"),
        (["--mmproj", "/nowhere/x"], "for --mmproj: expected a file; there is none"),
        (["--slot-save-path", "/nowhere/x"], "for --slot-save-path: expected a directory"),
        (["--json-schema", "{"], "for --json-schema: expected a JSON schema"),
        (["--chat-template-kwargs", "[]"], "expected a JSON object"),
        (["-C", "xyz"], "for -C: expected a hexadecimal number"),
        (["-Cr", "5-1"], "for -Cr: expected LOW-HIGH"),
        (["-Cr", "0-4000"], "for -Cr: expected CPUs are numbered"),
        (["-ot", "nothing"], "for -ot: expected PATTERN=TYPE"),
        (["-ot", "x=NOSUCH"], "bad value for -ot"),
        (["--samplers", "top_k;nope"], "for --samplers: expected names"),
        (["-c"], "-c needs a value: -c N"),
        (["--foo"], "unknown flag --foo: the embedded engine doesn't take it; --help lists"),
        (["--ctx-sise", "1"], "did you mean --ctx-size?"),
        (["--ctx-size=4"], "write `--ctx-size 4`"),
        (["--metrics", "yes"], "unexpected argument 'yes'"),
        (["--hf-repo", "a/b"], "can't take --hf-repo: the embedded engine doesn't download"),
        (["--device", "x"], "can't take --device: the embedded engine has no setting for it"),
        (["--tools", "all"], "can't take --tools"),
        (["--draft-max", "4"], "use --spec-draft-n-max"),
    ],
)
def test_what_is_wrong_is_said_by_name(argv: list[str], expected: str, command: Any) -> None:
    with pytest.raises(FlagError) as caught:
        command(*argv)
    assert expected in str(caught.value)


def test_a_bad_key_is_not_repeated(command: Any) -> None:
    with pytest.raises(FlagError) as caught:
        command("--api-key", ", ,")
    assert str(caught.value) == "bad value for --api-key: expected a list with commas between"


def test_a_model_must_be_named_and_be_one(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="no model: name its file with -m FILE"):
        read(["-c", "4"], {})
    with pytest.raises(FlagError, match=r"no such model file: /nowhere/m\.gguf"):
        read(["-m", "/nowhere/m.gguf"], {})
    with pytest.raises(FlagError, match="expected a file"):
        read(["-m", str(tmp_path)], {})


def test_what_the_environment_says_in_vain_is_told(tiny_model: Path) -> None:
    request = read(["-m", str(tiny_model), "-dt", "0.1"], {"LLAMA_ARG_CTX_SIZE": "5", "HOME": "/"})
    assert request.warnings == [
        "LLAMA_ARG_CTX_SIZE is set, but the embedded engine takes flags only",
        "-dt has no effect any more, in llama-server either",
    ]


def test_help_names_every_flag() -> None:
    text = help_text()
    assert all(name in text for flag in FLAGS for name in flag.names)


def run_engine(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run the engine to its end."""
    return subprocess.run(
        [*EMBEDDED, *argv],
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def test_it_answers_questions_about_itself() -> None:
    version = run_engine("--version")
    assert version.stdout == f"llamesh embedded engine: xllamacpp {xllamacpp.__version__}\n"
    assert version.returncode == 0
    assert run_engine("--list-devices").stdout.startswith("Available devices:\n")
    assert run_engine("--help").stdout.startswith("usage: ")


def test_mistakes_are_exit_code_1_on_stderr(tmp_path: Path, tiny_model: Path) -> None:
    not_gguf = tmp_path / "no.gguf"
    not_gguf.write_text("something else")
    for argv, expected in (
        (["--foo"], "error: unknown flag --foo: "),
        (["-m", str(tiny_model), "-c", "x"], "error: bad value 'x' for -c: "),
        (["-m", "/nowhere/m.gguf"], "error: no such model file: /nowhere/m.gguf"),
        (["-m", str(not_gguf)], f"error: can't use the model {not_gguf}: expected a GGUF file"),
    ):
        done = run_engine(*argv)
        assert done.returncode == 1
        assert done.stderr.startswith(expected)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


def test_a_mistake_is_told_without_loading_the_engine() -> None:
    program = (
        "import sys; from llamesh.local.engine.command_line import FlagError, read\n"
        "try: read(['-c', 'x'], {})\nexcept FlagError: print('xllamacpp' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean_environment({}), capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_a_broken_model_is_exit_code_1_with_llama_cpps_reason(tmp_path: Path, tiny_model: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_model.read_bytes()[:200_000])
    done = run_engine("-m", str(broken), "--port", "0")
    assert done.returncode == 1
    assert "not within the file bounds" in done.stderr
    assert f"error: llama.cpp couldn't serve {broken}" in done.stderr


def test_a_taken_port_is_exit_code_1(tiny_model: Path) -> None:
    with serving(tiny_model) as engine:
        port = engine.url.rpartition(":")[2]
        done = run_engine("-m", str(tiny_model), "--port", port)
    assert done.returncode == 1
    assert "couldn't bind" in done.stderr


def test_the_port_is_the_one_that_was_asked_for(tiny_model: Path) -> None:
    with serving(tiny_model) as engine:
        port = engine.url.rpartition(":")[2]
        assert engine.stop() == -signal.SIGTERM
    with serving(tiny_model, "--port", port) as engine:
        assert engine.url == f"http://127.0.0.1:{port}"


def test_it_says_context_slots_and_address_at_any_log_level(tiny_model: Path) -> None:
    with serving(tiny_model, "-c", "1024", "-np", "2", "--log-disable") as engine:
        assert engine.output().splitlines() == ["n_ctx = 512", "n_slots = 2", f"listening on {engine.url}"]
        assert engine.client.get("/props").json()["total_slots"] == 2


def test_slots_are_automatic_as_with_llama_server(tiny_model: Path, engine_binary: Path | None) -> None:
    with serving(tiny_model, binary=engine_binary) as engine:
        props = engine.client.get("/props").json()
    assert props["total_slots"] == 4
    assert props["default_generation_settings"]["n_ctx"] == 8192


def test_a_key_from_the_environment_is_needed(tiny_model: Path, engine_binary: Path | None) -> None:
    question = {"prompt": "x", "max_tokens": 2}
    with serving(tiny_model, binary=engine_binary, env={"LLAMA_API_KEY": "sesame"}) as engine:
        assert engine.client.get("/health").status_code == 200
        assert engine.client.post("/v1/completions", json=question).status_code == 401
        engine.client.headers["Authorization"] = "Bearer sesame"
        assert engine.ask("/v1/completions", question)["usage"]["completion_tokens"] == 2
        assert "sesame" not in engine.output()
        if engine_binary is None:
            assert "n_slots = 4" in engine.output()


def test_routes_move_under_a_prefix_and_names_are_aliases(tiny_model: Path) -> None:
    with started(["-m", tiny_model, "--port", "0", "--api-prefix", "/deep", "-a", "pet"]) as engine:
        engine.until(lambda: "n_slots = 4" in engine.output(), "slots")
        engine.learn_url()
        models = engine.client.get("/deep/v1/models").json()
        assert models["data"][0]["id"] == "pet"


def test_it_streams_and_chats_at_once(tiny_model: Path) -> None:
    with serving(tiny_model, "-np", "2") as engine:
        asked = {"prompt": "x", "max_tokens": 2000, "stream": True}
        with engine.client.stream("POST", "/v1/completions", json=asked) as stream:
            lines = stream.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"].isalnum()
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
            assert engine.ask("/v1/chat/completions", chat)["usage"]["completion_tokens"] == 3


def test_a_unix_socket_serves_too(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    with started(["-m", tiny_model, "--host", path]) as engine:
        engine.until(lambda: "n_slots = 4" in engine.output(), "slots")
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://engine", trust_env=False) as client:
            assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_the_middle_of_a_request(tiny_model: Path, number: int) -> None:
    with serving(tiny_model) as engine:
        asked = {"prompt": "x", "max_tokens": 100_000, "stream": True}
        with engine.client.stream("POST", "/v1/completions", json=asked) as stream:
            next(stream.iter_lines())
            assert engine.stop(number) == -number


def test_it_ends_with_the_process_that_started_it(tiny_model: Path) -> None:
    # A parent that starts an engine, tells its pid, and hangs.
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True, start_new_session=True)\n"
        "for line in child.stdout:\n"
        "    if line.startswith('listening'): break\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    command = [
        sys.executable,
        "-c",
        program,
        *EMBEDDED,
        "-m",
        str(tiny_model),
        "--port",
        "0",
        "--log-disable",
    ]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=clean_environment({}), start_new_session=True
    )
    engine: psutil.Process | None = None
    try:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        assert engine.is_running()
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the engine outlived its parent"
            time.sleep(POLL_SECONDS)
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()
        if engine is not None and engine.is_running():
            os.kill(engine.pid, signal.SIGKILL)


def test_a_load_shows_as_503_and_can_be_ended(tiny_model: Path, tmp_path: Path) -> None:
    """The port opens before the model is there, and a signal needs no Python to end it."""
    # The load waits for a lookup cache that is a pipe without a writer.
    pipe = tmp_path / "cache"
    os.mkfifo(pipe)
    flags = ("--spec-type", "ngram-cache", "-lcd", pipe)
    with started(["-m", tiny_model, "--port", "0", *flags]) as engine:
        process = psutil.Process(engine.popen.pid)

        def ports() -> list[int]:
            return [entry.laddr.port for entry in process.net_connections("tcp") if entry.status == "LISTEN"]

        engine.until(lambda: bool(ports()), "port")
        reply = engine.client.get(f"http://127.0.0.1:{ports()[0]}/health")
        assert reply.status_code == 503
        assert reply.json()["error"]["message"] == "Loading model"
        assert engine.stop() == -signal.SIGTERM
        assert "n_slots = " not in engine.output().replace("initializing, n_slots = ", "")
