"""Any other causal model of `transformers` compiles and matches too, or fails as it does under Inductor."""

import other_models
import pytest
import torch
from harness import LOSS, refused, rewritten, without_inductor

import fxopt
from fxopt.testing import Comparison, errors

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::fxopt.FxoptWarning")]


def outcome(model: torch.nn.Module, inputs: dict[str, object], backend: object) -> Comparison | Exception:
    """The comparison with fp64, or what was raised on the way there."""
    torch.compiler.reset()
    try:
        return errors(model, inputs, backend=backend)  # type: ignore[arg-type]
    except Exception as error:
        return error


def fine(found: Comparison | Exception) -> bool:
    """Compiled, ran, and kept the fp64 rule."""
    return isinstance(found, Comparison) and found.ok


@pytest.mark.parametrize("name", other_models.NAMES)
def test_other_model_matches(name: str) -> None:
    """fxopt's stages without Inductor's code generation, which is the same for every family and takes the time.

    Some models fail in AOTAutograd's eager compiler and not in Inductor (a view of a tangent), hence the second try.
    A random draw, a choice of experts that fp64 makes otherwise, or a graph that Dynamo cannot trace breaks any
    backend: then Inductor's must break alike.
    """
    try:
        model, inputs = other_models.build(name)
    except other_models.Unbuildable as reason:
        pytest.skip(str(reason))
    fxopt.clear_reports()
    found = outcome(model, inputs, without_inductor)
    if not fine(found):
        fxopt.clear_reports()
        found = outcome(model, inputs, "fxopt")
    sites = [*rewritten(), *refused()]
    if not fine(found):
        untouched = outcome(model, inputs, "inductor")
        assert not fine(untouched), str(found)
        assert type(untouched) is type(found), (found, untouched)
        pytest.skip(f"Inductor fails alike: {str(untouched)[:300]}")
    assert sites, f"no {LOSS} site in any graph"
    assert all(item.reasons and all(map(str.strip, item.reasons)) for item in refused())
