"""fxopt: a torch.compile backend for training.

``model = torch.compile(model, backend="fxopt")``; ``print(fxopt.explain(model, **batch))`` says what it does.
"""

from fxopt.backend import explain
from fxopt.errors import FxoptWarning, OptionError
from fxopt.options import Options
from fxopt.report import Report, clear_reports, reports
from fxopt.rule import Cost, NoSite, Pattern, Refusal, Region, Rewrite, Rule, Site
from fxopt.version import VERSION

__version__ = VERSION

__all__ = [
    "Cost",
    "FxoptWarning",
    "NoSite",
    "OptionError",
    "Options",
    "Pattern",
    "Refusal",
    "Region",
    "Report",
    "Rewrite",
    "Rule",
    "Site",
    "clear_reports",
    "explain",
    "reports",
]
