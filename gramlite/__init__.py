"""Small, local, trustworthy generative reward models: judge which of two responses is better, with a rationale.

import gramlite
judge = gramlite.load()                    # the reference judge; or a path to a GGUF file
verdict = judge(prompt="…", response_a="…", response_b="…")
verdict.winner, verdict.p_a, verdict.rationale
"""

from .errors import GramliteError, InputError, IntegrityError, ModelError, ResourceError
from .judging.judge import Judge, Settings
from .judging.pair import OrderVerdict, Pair, Verdict
from .loading import load
from .runtime.options import RuntimeOptions

__version__ = "0.2.0"

__all__ = [
    "GramliteError",
    "InputError",
    "IntegrityError",
    "Judge",
    "ModelError",
    "OrderVerdict",
    "Pair",
    "ResourceError",
    "RuntimeOptions",
    "Settings",
    "Verdict",
    "load",
]
