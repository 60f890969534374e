"""GGUF files whose types, and whose use of the importance matrix, are chosen on a checkpoint's own transcripts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gramlite.formats.artifact import Manifest

from .calibration import Transcript
from .ggml import Job, quantize_file
from .gguf_file import NEEDS_MATRIX, quantize_source
from .imatrix import ImportanceMatrix
from .mixed import choose_types, choose_weighed, target_bits
from .report import layer_bar
from .source import EXACT, ExactModel
from .tensor_types import check_overrides, file_type

FILE_OF_TYPE = {kind: f"{kind}_S" for kind in ("Q3_K", "Q4_K", "Q5_K")}


def quantize_calibrated(
    folder: Path,
    opened: ExactModel,
    destination: Path,
    transcripts: Sequence[Transcript],
    *,
    kind: str,
    imatrix: ImportanceMatrix,
    overrides: Sequence[tuple[str, str]] = (),
    calibration: dict[str, Any] | None = None,
    device: str = "cpu",
    force: bool = False,
) -> Manifest:
    """Quantize a checkpoint `folder` that is open as `opened` so that its verdicts' margins over transcripts change least.

    `kind` is a type of llama.cpp's, whose matrices keep the types of a plain file and are each written with or without
    the importance matrix, or `auto:4.5bpw`, where the types are chosen too.
    """
    bits = target_bits(kind)
    if bits is None and file_type(kind) in (*EXACT, "Q2_K_S"):  # nothing to choose, and a type that is all or nothing
        return quantize_source(
            opened, destination, kind=kind, imatrix=imatrix, overrides=overrides, force=force, calibration=calibration
        )
    with layer_bar() as progress:
        given: dict[str, Any] = {"importance": imatrix.means(), "device": device, "progress": progress}
        if bits is None:
            types = plain_types(opened, file_type(kind), overrides, imatrix)
            choice = choose_weighed(folder, transcripts, types=types, **given)
        else:
            wanted = check_overrides(opened, "Q4_0", overrides)
            settled = {name: fits[0] for name in opened.matrices if (fits := matching(name, wanted))}
            choice = choose_types(folder, transcripts, bits=bits, types=settled, **given)
    chosen = choice.options
    most = Counter(option.kind for option in chosen.values()).most_common(1)[0][0]
    pinned = [(f"^{re.escape(name)}$", option.kind) for name, option in chosen.items()]
    kept = {name: values for name, values in imatrix.sums.items() if name in chosen and chosen[name].weighed}
    return quantize_source(
        opened,
        destination,
        kind=FILE_OF_TYPE.get(most, most) if bits else kind,
        imatrix=replace(imatrix, sums=kept) if kept else None,
        overrides=pinned,
        force=force,
        calibration=calibration,
        settings=choice.describe() | ({"target_bits_per_weight": bits} if bits else {}),
        name=f"auto:{bits:g}bpw" if bits else None,
    )


def matching(name: str, overrides: Sequence[tuple[str, str]]) -> list[str]:
    """The types that overrides ask for a matrix, the one that counts first."""
    return [kind for pattern, kind in overrides if re.search(pattern, name)]


def plain_types(
    source: ExactModel, kind: str, overrides: Sequence[tuple[str, str]], imatrix: ImportanceMatrix
) -> dict[str, str]:
    """The type that llama.cpp gives every matrix where it has no importance matrix, as far as it can do without."""
    wanted = check_overrides(source, kind, overrides)
    needed = imatrix.means() if kind in NEEDS_MATRIX else {}
    job = Job(
        source=str(source.path), output=str(source.path.with_suffix(".none")), kind=kind, overrides=wanted, dry_run=True
    )
    changed = quantize_file(job, needed, advance=lambda done, total: None).types
    held = {tensor.name: tensor.type for tensor in source.header.tensors}
    return {name: changed.get(name, held[name]) for name in source.matrices}
