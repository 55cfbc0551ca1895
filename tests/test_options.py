"""Options are parsed once; what cannot be honoured is an error that names the value and the way out."""

import pytest
import torch

import fxopt
from fxopt import OptionError, Options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logit": "eager"}, r"no option 'logit' \(did you mean 'logits'\?\)\. Options: logits, rules"),
        ({"logits": "eagr"}, r"logits='eagr' \(did you mean 'eager'\?\) is not one of"),
        ({"rules": "norm"}, r"rules='norm' must be a list, for example rules=\['norm'\]"),
        ({"rules": ["-linear_cros_entropy"]}, r"no rule '-linear_cros_entropy' .did you mean 'linear_cross_entropy'"),
        ({"rules": [3]}, "3 is neither a rule name nor an fxopt.Rule"),
        ({"force": ["linear"]}, "option force: no rule 'linear'"),
        ({"verify": "yes"}, "verify='yes' must be True or False"),
        ({"dump": 3}, "dump=3 must be a directory path"),
        ({"dump": "out", "cards": ["sm_87"]}, "cards='sm_87' .did you mean 'sm_89'.. is not one of"),
        ({"dump": "out", "cards": "sm_86"}, "cards='sm_86' must be a list"),
        ({"cards": ["sm_86"]}, "cards is for the kernels of a dump: set dump"),
        ({"choose": "mesure"}, r"choose='mesure' \(did you mean 'measure'\?\) is not one of"),
        ({"inductor": {"max_autotun": True}}, "no 'max_autotun' .did you mean 'max_autotune'"),
        ({"inductor": 3}, "inductor=3 must be a dict"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(given, message):
    with pytest.raises(OptionError, match=message):
        Options.parse(given)


def test_a_dump_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(OptionError, match="exists and is not a directory"):
        Options.parse({"dump": path})


def test_the_error_reaches_the_user_unwrapped():
    with pytest.raises(OptionError, match="did you mean 'logits'") as raised:
        torch.compile(torch.sin, backend=fxopt.backend.fxopt, options={"logitz": 1})(torch.randn(3))
    inside = [one.path.name for one in raised.traceback if "torch" in one.path.parts]
    assert set(inside) <= {"eval_frame.py"}, "the user's call, Dynamo's entrance, and what was wrong"
    assert raised.traceback[-1].path.name == "options.py"


@pytest.mark.fault("a cache key that lacks options and version")
def test_defaults_and_equality():
    assert Options.parse(None) == Options.parse({}) == Options()
    assert hash(Options.parse({"inductor": {"max_autotune": True}}))
    assert Options.parse({"rules": ["-linear_cross_entropy"]}) != Options()


def test_rules_are_removed_and_added():
    extra = fxopt.Pattern(name="extra", spellings=(), replacement=torch.sin, inputs=lambda draw: {})
    names = [
        rule.name
        for rule in Options.parse({"rules": ["-linear_cross_entropy", extra], "force": ["extra"]}).active_rules()
    ]
    assert "linear_cross_entropy" not in names
    assert names[-1] == "extra"


def test_the_environment_sets_the_dump_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("FXOPT_DUMP", str(tmp_path))
    assert Options.parse({}).dump == tmp_path
    assert Options.parse({"dump": None}).dump is None


def test_inductor_options_and_mode_reach_inductor(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        fxopt.compat, "compile_graph", lambda gm, inputs, patches, key: seen.update(patches) or gm.forward
    )
    torch.compile(torch.sin, backend=fxopt.backend.fxopt, options={"inductor": {"max_fusion_size": 7}})(torch.randn(3))
    assert seen == {"max_fusion_size": 7}
    torch.compile(torch.cos, backend=fxopt.backend.fxopt, mode="max-autotune-no-cudagraphs")(torch.randn(3))
    assert seen["max_autotune"] is True
