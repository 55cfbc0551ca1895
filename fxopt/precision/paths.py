"""The paths by which a user may call the modules of the graph that is compiled: what patterns of ``keep_fp32`` match.

Dynamo names a module from the frame that it traces. Where a model breaks inside of a submodule, or layers are compiled
one by one, that frame is the submodule's, and the user's path starts at a module that holds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from fxopt.compat import Frame, whole_name
from fxopt.errors import OptionError
from fxopt.memory.steps import above, parents
from fxopt.precision.policy import Policy, matches

__all__ = ["Paths", "check_patterns"]


@dataclass(frozen=True)
class Paths:
    """Of the modules of one graph.

    argument: what the frame calls its module. prefixes: by name in the frame, what leads to a module from each that
              holds it; in a frame that Dynamo has cut, parts of the model have names of their own.
    own:      the names of all modules in it; empty where the frame has none. above: those in its holders.
    inner:    whether the frame is compiled because one that calls it breaks. code: the function that it is a part of.
    """

    argument: str = "self"
    prefixes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    above: frozenset[str] = frozenset()
    inner: bool = False
    code: str = ""

    @classmethod
    def of(cls, frame: Frame) -> Paths:
        """Of what Dynamo traces; looks at every module of the process."""
        where, _, name = frame.code.rpartition(" ")
        code = f"{where.rpartition(':')[0]} {whole_name(name)}"
        held = parents()
        named = dict(frame.others) if frame.module is None else {**frame.others, frame.argument: frame.module}
        holders = {name: list(above(module, held)) for name, module in named.items()}
        prefixes = {
            name: frozenset(path for one in holders[name] for path, part in _named(one) if part is module)
            for name, module in named.items()
        }
        if frame.module is None:
            return cls(prefixes=prefixes, inner=frame.inner, code=code)
        own = frozenset(path for path, _ in _named(frame.module))
        others = frozenset(path for one in holders[frame.argument] for path, _ in _named(one))
        return cls(frame.argument, prefixes, own, others, frame.inner, code)

    def spellings(self, path: str) -> Iterator[str]:
        """`path`, which starts at the frame, and by what else a user may call that module."""
        short = path.removeprefix(f"{self.argument}.")
        yield path
        yield short
        yield from (f"{prefix}.{short}" for prefix in self.prefixes.get(self.argument, ()))
        first, dot, rest = path.partition(".")
        yield from (f"{prefix}{dot}{rest}" for prefix in self.prefixes.get(first, ()))

    def known(self) -> Iterator[str]:
        """All paths that a pattern may mean."""
        for name in self.own:
            yield from self.spellings(name if self.argument == "self" else f"{self.argument}.{name}")
        yield from self.above


def _named(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Every name of every module in `module`, as if none was wrapped by `torch.compile`."""
    for name, part in module.named_modules(remove_duplicate=False):
        path = ".".join(one for one in name.split(".") if one != "_orig_mod")
        if path:
            yield path, part


_SEEN: dict[tuple[Policy, str], set[str]] = {}
"""By policy and function, module paths of its graphs; "" among them once the patterns of the policy were found."""
_INNER: dict[Policy, set[str]] = {}
"""By policy, the paths of modules whose frames were compiled because one that calls them breaks."""


def check_patterns(policy: Policy, paths: Paths, seen: Iterable[str], more_to_come: bool) -> None:
    """Raise `OptionError` for a pattern of ``keep_fp32`` that means no module.

    seen: the module paths in the graph. They are what there is to ask where the frame is of no module: then all graphs
    count up to the first that does not end in a break, and later ones need not hold every module.
    """
    if paths.inner:  # the frame around it is the model's
        _INNER.setdefault(policy, set()).update(paths.known(), seen)
        return
    found = _SEEN.setdefault((policy, paths.code), set())
    if not paths.own:
        found.update(path for path in seen if path)
        if more_to_come or "" in found:
            return
    known = paths.own or found | _INNER.get(policy, set())
    for pattern in policy.keep_fp32:
        if not any(matches(pattern, path) for path in (paths.known() if paths.own else known)):
            del _SEEN[policy, paths.code]
            some = ", ".join(sorted(known - {""})[:8]) + (", ..." if len(known) > 8 else "")
            raise OptionError(
                f"option precision: keep_fp32={pattern!r} matches no module of the model, which has {some}"
            )
    found.add("")
