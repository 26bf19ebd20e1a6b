"""Fingerprints change with contents and code, and with nothing else."""

import os
import re
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mpq.fingerprint import Fingerprint
from mpq.testing import tiny_networks


def fingerprint(value, code=True):
    found = Fingerprint(code=code)
    found.add(value)
    return found.hexdigest(), found.opaque


def defined(source, name="f", **names):
    exec(source, scope := {"__name__": "some_script", "torch": torch, "nn": nn, "np": np, **names})
    return scope[name]


VALUES = {
    "text": ("a", "b"),
    "numbers": (1, 1.0),
    "signed zeros": (0.0, -0.0),
    "booleans": (1, True),
    "arrays": (np.zeros(3), np.array([0, 0, 1.0])),
    "array shapes": (np.zeros((2, 3)), np.zeros((3, 2))),
    "object arrays": (np.array(["a", None]), np.array(["b", None])),
    "tensors": (torch.zeros(3), torch.zeros(3, dtype=torch.int32)),
    "lists": ([1, [2]], [[1], 2]),
    "dicts": ({"a": 1}, {"b": 1}),
    "mappings": (OrderedDict(a=1), OrderedDict(a=2)),
    "objects": (SimpleNamespace(x=[1]), SimpleNamespace(x=[2])),
    "patterns": (re.compile("a"), re.compile("b")),
    "sets": ({"a", "b"}, {"a", "c"}),
    "partials": (partial(max, 1), partial(max, 2)),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [SimpleNamespace(deep=(x,))]], ids=["plain", "nested"])
def test_values_of_other_content_differ(name, wrap):
    one, other = map(wrap, VALUES[name])
    for code in (False, True):
        assert fingerprint(one, code) == fingerprint(one, code)
        assert fingerprint(one, code) != fingerprint(other, code)
        assert not fingerprint(one, code)[1]


def test_cycles_end():
    one, other = [1], [2]
    one.append(one)
    other.append(other)
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"deep": [x]}, lambda x: {1, x}, lambda x: lambda: x])
def test_what_has_no_content_is_named(wrap):
    assert fingerprint(wrap(i for i in [1]))[1] == "generator"


def test_recurrent_layers_keep_references_to_their_weights():
    def made(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 3))

    assert fingerprint(made(0)) == fingerprint(made(0))
    assert fingerprint(made(0)) != fingerprint(made(1))
    assert not fingerprint(made(0))[1]


SOURCES = {
    "code": ("def f(x):\n return torch.tanh(x)", "def f(x):\n return torch.relu(x)"),
    "constants": ("f = lambda x: x * 2", "f = lambda x: x * 3"),
    "defaults": ("def f(x, a=1): return a", "def f(x, a=2): return a"),
    "keyword defaults": ("def f(x, *, a=1): return a", "def f(x, *, a=2): return a"),
    "globals": ("a = 1\nf = lambda x: x * a", "a = 2\nf = lambda x: x * a"),
    "globals of inner functions": ("a = 1\nf = lambda x: (lambda: a)()", "a = 2\nf = lambda x: (lambda: a)()"),
    "functions called": ("def g(x): return 1\ndef f(x): return g(x)", "def g(x): return 2\ndef f(x): return g(x)"),
    "closures": (
        "def make(a):\n return lambda x: x * a\nf = make(1)",
        "def make(a):\n return lambda x: x * a\nf = make(2)",
    ),
    "modules": ("f = lambda x: np.sin(x)", "f = lambda x: np.cos(x)"),
    "methods": (
        "class f(nn.Module):\n def forward(self, x): return x",
        "class f(nn.Module):\n def forward(self, x): 1",
    ),
    "bases": (
        "class B(nn.Module):\n def g(self): return 1\nclass f(B): pass",
        "class B(nn.Module):\n def g(self): return 2\nclass f(B): pass",
    ),
    "properties": (
        "class f:\n @property\n def a(self): return 1\n @staticmethod\n def b(): pass",
        "class f:\n @property\n def a(self): return 2\n @staticmethod\n def b(): pass",
    ),
    "class attributes": ("class f:\n a = 1", "class f:\n a = 2"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_other_code_differs(name):
    one, other = SOURCES[name]
    assert fingerprint(defined(one)) == fingerprint(defined("\n# moved down\n" + one))
    assert fingerprint(defined(one)) != fingerprint(defined(other))
    assert not fingerprint(defined(one))[1]


def test_models_differ_by_code_and_by_attributes_that_no_state_dict_holds():
    source = "class f(nn.Linear):\n def forward(self, x): return torch.{}(super().forward(x))"

    def made(function="tanh", **attributes):
        torch.manual_seed(0)
        net = defined(source.format(function))(2, 2)
        for name, value in attributes.items():
            setattr(net, name, value)
        net.register_buffer("hidden", torch.ones(1), persistent=False)
        return net

    plain = fingerprint(made())
    assert plain == fingerprint(made().eval())
    hook = made().register_forward_hook(lambda *args: None)
    hook.remove()
    assert plain == fingerprint(made())
    hooked, changed = made(), made()
    hooked.register_forward_hook(lambda *args: None)
    changed.hidden += 1
    others = [made("relu"), made(scale=2.0), made(act=torch.sigmoid), made(act=torch.exp), hooked, changed]
    assert len({plain[0], *(fingerprint(x)[0] for x in others)}) == 7


@dataclass
class Sample:
    pixels: np.ndarray
    text: str

    @cached_property
    def length(self):
        return len(self.text)


def examples():
    return [{"a", "b", "c"}, Sample(np.ones(2), "x"), *(net for net, _ in tiny_networks().values())]


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from test_fingerprint import examples, fingerprint
print([fingerprint(v) for v in examples()])
"""


@pytest.mark.slow
def test_another_process_finds_the_same():
    """Where text hashes otherwise, so that sets have another order."""
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)]
    found = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True)
    assert found.stdout.strip() == str([fingerprint(v) for v in examples()])
