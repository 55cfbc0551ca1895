"""Mixed precision as casts in the graph: products in 16 bits, sums, norms, softmax and losses in fp32.

The graph is built anew, node by node, and each operator gets the dtypes of the policy (`fxopt.precision.policy`). What
has a 16-bit value hands it on as it is, so that pointwise operators between products move half the bytes. Ambient
autocast and autocast regions are replaced: a region with ``enabled=False`` keeps the dtypes it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from fxopt import verify
from fxopt.fake import propagate, without_autocast
from fxopt.precision.casts import Cast, casts_of
from fxopt.precision.mixed import Mixed
from fxopt.precision.paths import Paths
from fxopt.precision.policy import Policy
from fxopt.rewrite import submodules


@dataclass
class Precision:
    """A graph with its casts.

    module: the graph.
    kept:   (node, in which dtype it stays and why) of products that are not computed in 16 bits.
    one_by_one: number and bytes of the casts of the same graph, forward, if each use had its own but parameters, as
            autocast makes them.
    paths:  the module paths that nodes of the graph come from.
    """

    module: fx.GraphModule
    kept: list[tuple[str, str]] = field(default_factory=list)
    one_by_one: tuple[int, int] = (0, 0)
    paths: set[str] = field(default_factory=set)

    def note(self, casts: Sequence[Cast]) -> str:
        """A sentence for the report, about the casts left when the graph is finished; autograd makes the backward's."""
        count, total = self.one_by_one
        mib = sum(cast.bytes for cast in casts) / 2**20
        return (
            f"{len(casts)} casts write {mib:.1f} MiB in the forward; one a use and one a parameter, as autocast makes "
            f"them, {count} would write {total / 2**20:.1f} MiB"
        )


def apply(gm: fx.GraphModule, policy: Policy, paths: Paths = Paths()) -> Precision:  # noqa: B008 it is frozen
    """`gm`, canonical and propagated, with every cast that `policy` asks for; `gm` itself is untouched.

    paths: by which its modules are called. Outputs keep shapes, dtypes and strides. What follows must be done without
    ambient autocast.
    Raises `verify.VerificationError` if the interface changed.
    """
    with without_autocast():
        mixed = Mixed(gm, policy, paths)
        module = mixed.run()
        for one in submodules(module):
            one.graph.eliminate_dead_code(lambda node: not verify.is_removable(node))
            one.recompile()
            propagate(one)
    verify.same_interface(gm, module)
    return Precision(module, mixed.kept, mixed.one_by_one, mixed.paths)


def casts_in(gm: fx.GraphModule) -> list[Cast]:
    """The casts of fxopt's that `gm` holds, bodies of checkpoints included."""
    return [cast for one in submodules(gm) for cast in casts_of(one.graph)]
