"""``python -m fake_card.offload CASES``: plans of a Llama's step on a card that is not there, and the step on its link.

Cases by name: `share`, where the budget lies between the least that a step takes without offloading (0) and what it
takes without a plan (1); `link`, bytes a second. The answers are JSON. Nothing is computed, and no code is lowered: the
graphs are cut by what the solver says.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from fake_card import install

LAYERS = 4


def steps(cases: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The answers by case."""
    import torch
    import transformers
    import triton

    import fxopt
    from fake_card.decide import _Driver, move
    from fxopt.backend import run
    from fxopt.compat import FakeTensorMode, aot_backend_by

    triton.runtime.driver._active = _Driver()
    found: dict[str, Any] = {}

    def compiler(graph: Any, inputs: Any) -> Any:
        return aot_backend_by(lambda gm, given, **how: cut(gm, given, how, cases, found))(graph, inputs)

    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=4096, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        move(model)
        tokens = torch.zeros(4, 1024, dtype=torch.int64, device="cuda")
        backend = lambda gm, given: run(gm, given, fxopt.Options(), compiler)[1]  # noqa: E731
        torch.compile(model, backend=backend, fullgraph=True)(input_ids=tokens, labels=tokens)
    return found


def cut(gm: Any, inputs: Any, how: dict[str, Any], cases: dict[str, dict[str, float]], found: dict[str, Any]) -> Any:
    """Plan, cut and simulate each case."""
    import numpy as np
    import torch

    from fxopt.memory.program import Program
    from fxopt.memory.rates import device_of
    from fxopt.memory.solution import Solution
    from fxopt.memory.solve import solve
    from fxopt.memory.timing import ModelledTimes
    from fxopt.passes.memory_plan import Cut

    card = torch.device("cuda:0")
    whole = Cut(gm, inputs, how, card, ModelledTimes(device_of(card)))
    program = Program(whole.joint)
    least = solve(program, None)
    assert least is not None
    stock = Solution(whole.stock, np.zeros_like(whole.stock), optimal=True)
    bottom, top = (program.modelled(one).peak for one in (least, stock))
    for name, case in cases.items():
        budget = bottom + case["share"] * (top - bottom)
        plan = solve(Program(whole.joint, case["link"]), budget)
        found[name] = {"budget": budget} | ({} if plan is None else answer(whole, plan, case["link"]))
    return whole.by(None)


def answer(whole: Any, plan: Any, link: float) -> dict[str, Any]:
    """All that a test may ask."""
    import torch
    from link import Simulation

    from fxopt.memory.offload import Places
    from fxopt.memory.program import Program

    joint, places = whole.joint, Places.of(whole.joint)
    forward, backward = whole.by(whole.names(plan))
    nodes = [*zip(joint.forward, joint.seconds, strict=True), *zip(joint.backward, joint.backward_seconds, strict=True)]
    seconds = {node.name: float(one) for node, one in nodes}
    step = Simulation(seconds, link or 1.0, {**places.block, **places.stage}).run(forward, backward)
    chosen = [node for node, offloaded in zip(joint.forward, plan.offloaded, strict=True) if offloaded]
    inputs = backward.graph.find_nodes(op="placeholder")
    tensors = {node.name: node.meta["val"] for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)}
    return {
        "step": dataclasses.asdict(step),
        "peak": Program(joint, link).modelled(plan).peak,
        "offloaded": {node.name: node.meta["val"].nbytes for node in chosen},
        "blocks": sorted({places.block[node.name] for node in chosen}),
        "again": sum(seconds[node.name] for node in backward.graph.nodes if node.name in places.block),
        "on host": sorted(name for name, value in tensors.items() if value.device.type == "cpu"),
    }


if __name__ == "__main__":
    install()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "memory"))
    print(json.dumps(steps(json.loads(sys.argv[1]))))
