"""vidl.swap and vidl.unswap on models that are defined here."""

import copy
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import vidl
from vidl.swapping import registry
from vidl.swapping.registry import Family, Rule, remember, state_of


class Doubling(nn.Module):
    def __init__(self, limit=None):
        super().__init__()
        self.inner, self.limit = nn.Linear(2, 2), limit

    def forward(self, x):
        return 2 * self.inner(x)


class SameAttention(Doubling):
    pass


class Swapped(Doubling):
    def forward(self, x):
        state = state_of(self)
        return self.inner(x) + self.inner(x) + 0 * len(state.backend)


def refuse(module):
    return None if module.limit is None else f"a limit of {module.limit}"


def set_up(module):
    state_of(module).memory["twice"] = 2


def mark(module):
    module.undone = state_of(module).memory["twice"]


RULE = Rule(Doubling, Swapped, refuse, setup=set_up, undo=mark)
ME = sys.modules[__name__]
FAMILY = Family([RULE])


@pytest.fixture(autouse=True)
def families_of_this_file(monkeypatch):
    monkeypatch.setattr(registry, "families_of", lambda model: [ME.FAMILY])


def model(*parts):
    torch.manual_seed(0)
    return nn.Sequential(*(parts or (Doubling(), nn.ReLU(), Doubling())))


def test_a_forward_on_the_object_itself_is_not_overlooked():
    m = model()
    m[0].forward = m[0].forward  # as accelerate's hooks do
    report = vidl.swap(m)
    assert [change.name for change in report.swapped] == ["2"]
    assert "its forward was replaced on the object" in report.left[0].note
    with pytest.raises(ValueError, match="cannot swap .*Doubling: its forward was replaced"):
        remember(m[0], swapped=Swapped)
    assert state_of(m[0]) is None


def test_swap_and_unswap():
    m, x = model().eval(), torch.randn(3, 2)
    names, out, children = list(m.state_dict()), m(x), [type(part) for part in m]
    called = []
    m[0].register_forward_hook(lambda *_: called.append(1))
    report = vidl.swap(m, backend="reference")
    assert [type(part) for part in m] == [Swapped, nn.ReLU, Swapped]
    assert [change.name for change in report.swapped] == ["0", "2"] and not report.left
    assert list(m.state_dict()) == names and not m[0].training
    assert state_of(m[0]).backend == "reference"
    torch.testing.assert_close(m(x), out)
    assert called == [1]
    vidl.unswap(m)
    assert [type(part) for part in m] == children
    assert m[0].undone == 2 and "_vidl" not in vars(m[0])
    assert torch.equal(m(x), out)


def test_copies_are_swapped_and_independent():
    m, x = model(), torch.randn(3, 2)
    vidl.swap(m)
    copied = copy.deepcopy(m)
    state_of(copied[0]).memory["twice"] = 3
    assert state_of(m[0]).memory["twice"] == 2
    vidl.unswap(m)
    assert type(copied[0]) is Swapped and torch.equal(copied(x), m(x))
    vidl.unswap(copied)
    assert type(copied[0]) is Doubling


def test_pickle():
    sys.modules.setdefault(__name__, ME)
    m = model()
    vidl.swap(m)
    again = pickle.loads(pickle.dumps(m))
    assert type(again[0]) is Swapped
    vidl.unswap(again)
    assert type(again[0]) is Doubling


def test_what_is_left_is_named_with_its_reason():
    m = model(Doubling(), Doubling(limit=7), SameAttention(), nn.MultiheadAttention(2, 1))
    report = vidl.swap(m)
    assert {change.name: change.note for change in report.left} == {
        "1": "a limit of 7",
        "2": f"a subclass of {__name__}.Doubling, which may compute something else",
        "3": "vidl does not support it",
    }
    assert type(m[1]) is Doubling and type(m[2]) is SameAttention
    text = str(report)
    assert "1 modules swapped, 3 left" in text and "a limit of 7" in text


def test_the_report_counts_layers():
    report = vidl.swap(nn.ModuleDict({"blocks": model(), "one": Doubling()}))
    assert f"blocks.* (2 x): {__name__}.Doubling -> {__name__}.Swapped" in str(report)


def test_a_model_that_is_itself_swapped():
    m = Doubling()
    assert "the model itself" in str(vidl.swap(m))
    assert type(m) is Swapped


@pytest.mark.parametrize(
    "m, why",
    [
        (nn.Linear(2, 2), "vidl recognises no attention"),
        (nn.MultiheadAttention(2, 1), "vidl does not support it"),
        (Doubling(limit=7), "a limit of 7"),
    ],
)
def test_nothing_to_swap(m, why):
    kind = type(m)
    with pytest.raises(ValueError, match=why) as error:
        vidl.swap(m)
    assert "docs/guide/swapping.md" in str(error.value)
    assert type(m) is kind and state_of(m) is None


def test_wrong_calls():
    m = model()
    with pytest.raises(ValueError, match="no module of this model is swapped"):
        vidl.unswap(m)
    with pytest.raises(ValueError, match="backend must be .* got 'fast'"):
        vidl.swap(m, backend="fast")
    with pytest.raises(TypeError, match="need a torch.nn.Module, got int"):
        vidl.swap(3)
    vidl.swap(m)
    with pytest.raises(ValueError, match="already swapped .*first is '0'.*vidl.unswap"):
        vidl.swap(m)
    m[2].__class__ = SameAttention  # as fully_shard does
    with pytest.raises(ValueError, match="swapped '2' to .*Swapped, .* is now .*SameAttention"):
        vidl.unswap(m)


BAD = [None, "x", [1.5], {}, 2.5, -1, True, float("nan"), torch.zeros(2, 2)]
BAD += [torch.zeros(3, device="meta"), torch.zeros(3), object()]
CALLS = {
    "swap": dict(model=None, backend="auto"),
    "unswap": dict(model=None),
    "mask": dict(model=None, ratio=0.5, backend="auto"),
    "prune": dict(model=None, keep_rate=0.5, layers=[0], scores="cls", fuse=None, when="before_mlp")
    | dict(rounding="ceil", backend="auto"),
}


@pytest.mark.parametrize("bad", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize(
    "function, argument", [(f, argument) for f, call in CALLS.items() for argument in call]
)
def test_bad_calls_name_the_argument(function, argument, bad):
    if argument == "fuse" and bad is None:
        return
    call = CALLS[function] | {"model": model(), argument: bad}
    with pytest.raises((TypeError, ValueError), match=argument):
        getattr(vidl, function)(**call)


def test_a_swap_that_fails_leaves_no_trace(monkeypatch):
    def fail(module):
        raise RuntimeError("no memory")

    monkeypatch.setattr(ME, "FAMILY", Family([replace(RULE, setup=fail, undo=None)]))
    m = model()
    with pytest.raises(RuntimeError, match="no memory"):
        vidl.swap(m)
    assert type(m[0]) is Doubling and state_of(m[0]) is None


def test_versions(monkeypatch):
    registry.check_version.cache_clear()
    for version in ("1.0.31", "1.0.31.dev0"):
        monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(__version__=version))
        registry.check_version.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            registry.check_version("timm")
    for version in ("1.0.30", "1.1", "2.0.0"):
        monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(__version__=version))
        registry.check_version.cache_clear()
        with pytest.warns(UserWarning, match=f"tested with timm 1.0.31 .* this is {version}"):
            registry.check_version("timm")
    registry.check_version.cache_clear()


def test_import_is_light():
    code = "import sys, vidl; assert not {'torch', 'timm', 'transformers'} & set(sys.modules)"
    code += "; vidl.swap; assert not {'timm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'swop'"):
        vidl.swop  # noqa: B018
