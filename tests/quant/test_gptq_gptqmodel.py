"""A GPTQ folder in transformers with gptqmodel, an independent reader of the format, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from gramlite.quant.calibration import Transcript, describe
from gramlite.quant.gptq import quantize_gptq
from gramlite.quant.solve import GptqSettings
from transformers import AutoModelForCausalLM

from gramlite.formats.gptq_folder import open_gptq

# in a process of its own: gptqmodel changes transformers when it is imported
LOGITS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu").eval()
linear = type(model.model.layers[0].mlp.down_proj)
assert linear.__module__.startswith("gptqmodel"), linear
with torch.inference_mode():
    print("logits", json.dumps(model(torch.tensor([json.loads(sys.argv[2])])).logits[0, -1].tolist()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_gptqmodel_computes_what_the_folder_says(
    bits: int, make_checkpoint: Callable[..., Path], transcripts: list[Transcript], tmp_path: Path
) -> None:
    for package in ("gptqmodel", "optimum"):
        if find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed: pip install 'gramlite[gptq-cuda]'")
    source = make_checkpoint(hidden_size=128, intermediate_size=256, head_dim=32)
    settings = GptqSettings(bits=bits, group_size=32)
    calibration = describe(transcripts, tokens=10_000, seed=0, source="made up")
    quantize_gptq(source, tmp_path / "out", transcripts, settings, calibration=calibration)
    ids = transcripts[0].ids

    folder = open_gptq(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    state = model.state_dict()
    for name in folder.linears:
        state[f"{name}.weight"] = torch.from_numpy(folder.read_linear(name).dequantize())
    model.load_state_dict(state)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].numpy()

    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", LOGITS, str(tmp_path / "out"), json.dumps(ids)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if line.startswith("logits "))
    logits = np.array(json.loads(line.removeprefix("logits ")))
    assert np.abs(logits - expected).max() < 1e-2 * np.abs(expected).max()
