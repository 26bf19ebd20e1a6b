"""What was measured is found again, and nothing else; killed runs go on where they stopped."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpq
from mpq.errors import DataError, MpqError
from mpq.store import ScoreStore
from mpq.testing import tiny_network, tiny_networks


def table(net, data, schemes="W2A8,W4A8", store=None, estimator="influence", **options):
    return mpq.analyze(
        net, data, schemes, estimator=estimator, estimator_options=options, store=store, progress=False
    ).table


def same(a, b):
    for name in ("loss", "stderr", "interactions", "rows"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        assert x is None or x.tobytes() == y.tobytes()
    assert a.ceiling == b.ceiling


def test_entries_are_found_by_their_content_only(tmp_path):
    store = ScoreStore(tmp_path).within(model="a")
    assert store.get(x=1) is None
    store.put({"v": np.arange(3)}, x=1)
    assert store.get(x=1)["v"].tolist() == [0, 1, 2]
    assert store.get(x=2) is None
    assert ScoreStore(tmp_path).within(model="b").get(x=1) is None
    assert ScoreStore(tmp_path).within(model="a").get(x=1)["v"].tolist() == [0, 1, 2]
    assert store.get(x=1, model="b") is None  # context and entry may use one name


def test_damaged_and_renamed_entries_are_ignored(tmp_path):
    store = ScoreStore(tmp_path)
    store.put({"v": np.arange(3)}, x=1)
    store.put({"v": np.arange(4)}, x=2)
    one, two = store._path(store.key(x=1)), store._path(store.key(x=2))
    two.replace(one)  # holds another key
    assert store.get(x=1) is None
    one.write_bytes(one.read_bytes()[:-5])
    assert store.get(x=1) is None
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("estimator", ["influence", "anchored", "weight_sqnr"])
def test_a_second_run_measures_nothing_and_gives_the_same_bytes(tmp_path, estimator):
    net, data = tiny_network()
    first = table(net, data, store=tmp_path, estimator=estimator)
    files = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors"))
    again = table(net, data, store=tmp_path, estimator=estimator)
    same(first, table(net, data, estimator=estimator))
    same(first, again)
    assert files == sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors"))
    if estimator == "influence":  # what is left is finding the batch axis and activation ranges
        assert again.provenance["forward_passes"] == 3 < first.provenance["forward_passes"]


def test_another_scheme_and_more_data_measure_only_what_is_missing(tmp_path):
    net, data = tiny_network()
    table(net, data[:1], "W2,W4", store=tmp_path)

    def written():
        return len(list(tmp_path.rglob("*.safetensors")))

    assert written() == 2  # one batch, two schemes
    more = table(net, data[:1], "W2,W3,W4", store=tmp_path)
    assert written() == 3
    same(more, table(net, data[:1], "W2,W3,W4"))
    both = table(net, data, "W2,W3,W4", store=tmp_path)
    assert written() == 6
    same(both, table(net, data, "W2,W3,W4"))


def test_other_weights_data_seeds_and_options_find_nothing(tmp_path):
    net, data = tiny_network()
    table(net, data, store=tmp_path)
    changed, _ = tiny_network()
    with torch.no_grad():
        changed[0].weight[0, 0, 0, 0] += 1e-6
    for other in (
        lambda: table(changed, data, store=tmp_path),
        lambda: table(net, [d + 1e-6 for d in data], store=tmp_path),
        lambda: table(net, data, store=tmp_path, draws=1),
        lambda: mpq.analyze(net, data, "W2A8,W4A8", estimator="influence", seed=1, store=tmp_path, progress=False),
        lambda: mpq.analyze(net, data, "W2A8,W4A8", estimator="influence", loss="mse", store=tmp_path, progress=False),
        lambda: mpq.analyze(
            net, data, "W2A8,W4A8", estimator="influence", weight_range="minmax", store=tmp_path, progress=False
        ),
    ):
        before = len(list(tmp_path.rglob("*.safetensors")))
        other()
        assert len(list(tmp_path.rglob("*.safetensors"))) == before + 4


class Activated(nn.Module):
    """What it computes is no part of its weights, nor of its repr."""

    def __init__(self, activation):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.activation = activation

    def forward(self, x):
        return self.b(self.activation(self.a(x)))


class Tanh(Activated):
    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Relu(Activated):
    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


Relu.__name__ = Relu.__qualname__ = "Tanh"


def weighted_loss(weight):
    fn = nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, weight]), reduction="none")
    return lambda out, batch: fn(out, batch[1])


class ModuleLoss(nn.Module):
    """Two of them have the same repr."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0, 1.0, weight]))

    def forward(self, out, batch):
        return F.cross_entropy(out, batch[1], self.weight, reduction="none")


def swap(batch):
    return batch.flip(1)


MODELS = {
    "forward of a class": (lambda: Tanh(None), lambda: Relu(None)),
    "attributes": (lambda: Activated(torch.tanh), lambda: Activated(torch.relu)),
}
OPTIONS = {
    "forward": ({"forward": lambda m, b: m(b[0])}, {"forward": lambda m, b: m(b[0] * 2)}),
    "functions that forward calls": ({"forward": lambda m, b: m(b[0])}, {"forward": lambda m, b: m(swap(b[0]))}),
    "no forward": ({}, {"forward": lambda m, b: m(b[0])}),
    "loss": ({"loss": lambda out, b: out[:, 0] ** 2}, {"loss": lambda out, b: out[:, 1] ** 2}),
    "what a loss holds": ({"loss": weighted_loss(1.0)}, {"loss": weighted_loss(3.0)}),
    "a loss's buffers": ({"loss": ModuleLoss(1.0)}, {"loss": ModuleLoss(3.0)}),
}


def stored(folder, make, batches, **options):
    torch.manual_seed(0)
    return mpq.analyze(make(), batches, "W2,W4", estimator="influence", store=folder, progress=False, **options).table


def labelled(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 4, generator=generator), torch.randint(0, 3, (4,), generator=generator)) for _ in range(2)]


@pytest.mark.parametrize("name", [*MODELS, *OPTIONS])
def test_other_code_with_the_same_weights_finds_nothing(tmp_path, name):
    made = MODELS.get(name, [lambda: Tanh(None)] * 2)
    options = OPTIONS.get(name, [{}, {}])
    first, second = (stored(tmp_path, m, labelled(), **o) for m, o in zip(made, options, strict=True))
    assert first.loss.tobytes() != second.loss.tobytes() or name == "no forward"
    for folder, m, o, found in zip((tmp_path / "1", tmp_path / "2"), made, options, (first, second), strict=True):
        same(found, stored(folder, m, labelled(), **o))
    files = len(list(tmp_path.glob("??/*.safetensors")))
    assert files == 8
    same(second, stored(tmp_path, made[1], labelled(), **options[1]))
    assert len(list(tmp_path.glob("??/*.safetensors"))) == files


class Scene:
    """Batches of a kind that only a ``forward=`` can read."""

    def __init__(self, values, text="a"):
        self.parts = {"values": [np.asarray(values, np.float32)]}
        self.text = text


def read_scene(model, scene):
    return model(torch.tensor(scene.parts["values"][0])) * len(scene.text)


SCENES = {
    "arrays": lambda a, b: [Scene(a), Scene(b)],
    "text": lambda a, b: [Scene(a), Scene(a, "abc")],
}


@pytest.mark.parametrize("name", SCENES)
def test_batches_of_any_kind_are_told_apart(tmp_path, name):
    one, other = SCENES[name](*np.random.default_rng(0).normal(size=(2, 4, 4)))
    options = {"forward": read_scene, "estimator_options": {"exact": True}}
    first = stored(tmp_path, lambda: Tanh(None), [one], **options)
    second = stored(tmp_path, lambda: Tanh(None), [other], **options)
    assert (first.loss != second.loss).any()
    same(second, stored(tmp_path / "fresh", lambda: Tanh(None), [other], **options))
    assert first.provenance["data_hash"] != second.provenance["data_hash"]


def test_what_a_store_can_not_tell_apart_is_refused(tmp_path):
    def measure(store=None, **options):
        torch.manual_seed(0)
        data = options.pop("data", labelled())
        return mpq.analyze(Tanh(None), data, "W2,W4", store=store, progress=False, **options)

    generator = (i for i in range(3))
    forward = {"forward": lambda m, b: m(b[0]) if generator else None}
    loss = {"loss": lambda out, b: out[:, 0] if generator else None}
    for what, options in {"forward=": forward, "the loss": loss}.items():
        with pytest.raises(MpqError, match=f"stable source to tell {what} from .* a generator, which has none; mea"):
            measure(tmp_path, **options)
        assert "data_hash_without" not in measure(**options).provenance
    opaque = {"data": [{"x": x, "opaque": generator} for x, _ in labelled()], "forward": lambda m, b: m(b["x"])}
    with pytest.raises(DataError, match="holds a generator, whose content can't be read; measure without store="):
        measure(tmp_path, **opaque)
    assert measure(**opaque).provenance["data_hash_without"] == "generator"


class Routed(nn.Module):
    """The expert gets all samples of the first batch, so that its output looks like one row for each."""

    def __init__(self):
        super().__init__()
        self.embed, self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.embed(x)
        out = h.clone()
        out[x[:, 0] > 0] = self.expert(h[x[:, 0] > 0])
        return self.head(out)


def test_more_data_that_mix_the_samples_of_a_layer_find_nothing_old(tmp_path):
    torch.manual_seed(0)
    net, data = Routed(), [torch.randn(4, 4) for _ in range(2)]
    data[0][:, 0] = data[0][:, 0].abs()
    data[1][:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert table(net, data[:1], "W2,W4", store=tmp_path).provenance["mixed_layers"] == []
    found = table(net, data, "W2,W4", store=tmp_path)
    assert found.provenance["mixed_layers"] == ["expert"]
    same(found, table(net, data, "W2,W4"))


class Counting(ThreadPoolExecutor):
    """Says how many jobs it was given."""

    given = 0

    def submit(self, *args, **kwargs):
        self.given += 1
        return super().submit(*args, **kwargs)


@pytest.mark.parametrize("name", ["conv", "attention", "shared"])
@pytest.mark.parametrize("estimator", ["influence", "anchored"])
def test_threads_give_the_same_bytes(name, estimator):
    net, data = tiny_networks()[name]
    with Counting(2) as pool:
        options = {"estimator": estimator, **({"anchors": 4} if estimator == "anchored" else {})}
        same(table(net, data * 3, executor=pool, **options), table(net, data * 3, **options))
    assert pool.given == 6  # batches


@pytest.mark.slow
def test_processes_give_the_same_bytes(tmp_path):
    """Jobs with hooks, quantizers, a store and an attention are sent to processes that share nothing with this one."""
    net, data = tiny_networks()["attention"]
    pool = ProcessPoolExecutor(2, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
    with pool:
        found = table(net, data, executor=pool, store=tmp_path)
    same(found, table(net, data))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4  # written by the workers
    again = table(net, data, store=tmp_path)
    same(found, again)
    assert again.provenance["forward_passes"] == 3


# Runs that fork from one process, so that only one has to start and to import; each is killed at its n-th put.
PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
import mpq, mpq.store
from mpq.testing import tiny_network
torch.set_num_threads(1)
net, data = tiny_network()
batches = [x for batch in data for x in batch.split(1)]
options = {"anchors": 6, "anchor_samples": 4}
write = mpq.store.save_file
mpq.analyze(net, batches[:2], "W2,W4", estimator_options=options, progress=False)

def run(out, store, kill_at, moment):
    puts = 0

    def save_file(*args):
        nonlocal puts
        puts += 1
        if puts == kill_at and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)
        if puts == kill_at and moment == "written":
            os.kill(os.getpid(), signal.SIGKILL)
        if puts == kill_at + 1 and moment == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    mpq.store.save_file = save_file
    found = mpq.analyze(net, batches, "W2,W4", estimator_options=options, store=store, progress=False)
    found.table.save(out)

for line in sys.stdin:
    out, store, kill_at, moment = line.split()
    child = os.fork()
    if not child:
        run(out, store, int(kill_at), moment)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_killed_ten_times_a_run_ends_with_the_same_bytes(tmp_path):
    generator = np.random.default_rng(0)
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    def run(name, kill_at=0, moment="never"):
        program.stdin.write(f"{tmp_path / name}.safetensors {tmp_path / name} {kill_at} {moment}\n")
        program.stdin.flush()
        return os.waitstatus_to_exitcode(int(program.stdout.readline()))

    def entries(name):
        return len(list((tmp_path / name).rglob("*.safetensors")))

    with program:
        assert run("whole") == 0
        kills, kept = 0, [0]
        for _ in range(10):
            moment = str(generator.choice(["before", "written", "after"]))
            kills += run("killed", int(generator.integers(1, 4)), moment) == -signal.SIGKILL
            kept.append(entries("killed"))
        assert kills == 10
        assert kept == sorted(kept)  # nothing measured is lost
        assert 8 < kept[-1] < entries("whole")
        assert run("killed") == 0
        assert entries("killed") == entries("whole")
        program.stdin.close()
    whole, killed = (mpq.sensitivity.SensitivityTable.load(tmp_path / f"{n}.safetensors") for n in ("whole", "killed"))
    same(whole, killed)
