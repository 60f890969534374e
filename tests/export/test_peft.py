"""Adapters as PEFT itself merges them, over all that its configuration can say; what ours cannot say is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from gramlite.export.adapter import export_adapter
from gramlite.export.merge import merge_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gramlite.errors import ModelError

pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

MakeCheckpoint = Callable[..., Path]
MODULES = ["q_proj", "k_proj", "down_proj"]
Q0 = "model.layers.0.self_attn.q_proj"
PATTERNS: dict[str, dict[str, Any]] = {
    "first-fits": {"alpha_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 5}},
    "first-fits-general": {"alpha_pattern": {"a_general": 2, "k_proj": 5, "layers.0.self_attn.k_proj": 3}},
    "ranks-first-fits": {"rank_pattern": {"layers.1.mlp.down_proj": 2, "mlp.down_proj": 6}},
    "expression": {"rank_pattern": {r".*\.(0)\.self_attn\..*": 2}, "alpha_pattern": {r"(?:q|k)_proj": 7}},
    "alternatives": {"alpha_pattern": {r"q_proj|.*layers\.1\.mlp\.down_proj": 9}},
    "anchored": {"alpha_pattern": {rf"^{Q0}": 9}, "rank_pattern": {"^q_proj": 2}},
    "a-dot-is-any-character": {"alpha_pattern": {"self.attn.q.proj": 9}},
    "whole-name": {"rank_pattern": {Q0: 6}, "alpha_pattern": {Q0: 1.5}},
    "none-fits": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"proj": 2}},
    "rslora": {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"down_.*": 3}},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "untrained": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "dropout": {"lora_dropout": 0.3},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*layers\.1\.(self_attn\.[qv]|mlp\.up)_proj"},
    "excluded": {"exclude_modules": [Q0]},
    "some-layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "fan-in-fan-out": {"fan_in_fan_out": True},
    "tying": {"ensure_weight_tying": True},
    "unused-settings": {"qalora_group_size": 8, "megatron_core": "other", "loftq_config": {"loftq_bits": 4}},
    **{f"pattern-{name}": pattern for name, pattern in PATTERNS.items()},
}
RIGHT_ALWAYS = ("anchored", "whole-name", "none-fits")


def save_adapter(folder: Path, checkpoint: Path, *, initial: Path | None = None, **options: Any) -> Path:
    """An adapter that PEFT makes and saves, its factors as random as training leaves them."""
    import torch
    import transformers

    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    words = {"r": 4, "lora_alpha": 8, "target_modules": MODULES, "task_type": "CAUSAL_LM", **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**words))
    if initial:
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(initial)
        adapted.peft_config["default"].init_lora_weights = words["init_lora_weights"]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder, path_initial_model_for_weight_conversion=str(initial) if initial else None)
    return folder


def peft_deltas(checkpoint: Path, adapter: Path) -> dict[str, Any]:
    """What PEFT's own merge adds to each weight of the checkpoint, by name."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    return {name: (after[name] - value).numpy() for name, value in before.items()}


def merged_deltas(checkpoint: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """What `export merge` adds."""
    from safetensors.torch import load_file

    merge_adapter(checkpoint, adapter, out)
    before, after = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    return {name: (after[name] - value).numpy() for name, value in before.items()}


def exported_deltas(checkpoint: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """What llama.cpp adds with the adapter of `export adapter`: alpha / rank * B @ A, by the checkpoint's names."""
    import gguf

    from gramlite.formats.architecture import expected_tensors, read_architecture
    from gramlite.formats.checkpoint import read_config

    export_adapter(adapter, checkpoint, out, dtype="f32")
    reader = gguf.GGUFReader(out)
    factors = {tensor.name: numpy.array(tensor.data) for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    found = {}
    for name, expected in expected_tensors(read_architecture(read_config(checkpoint))).items():
        if f"{expected.target}.lora_a" in factors:
            a, b = (factors[f"{expected.target}.lora_{letter}"] for letter in "ab")
            assert not expected.heads  # Qwen's heads are not permuted
            found[name] = alpha / len(a) * b @ a
    return found


def check_like_peft(checkpoint: Path, adapter: Path, work: Path) -> None:
    wanted = peft_deltas(checkpoint, adapter)
    changed = {name for name, delta in wanted.items() if numpy.abs(delta).max() > 1e-6}
    assert changed
    merged = merged_deltas(checkpoint, adapter, work / "merged")
    exported = exported_deltas(checkpoint, adapter, work / "lora.gguf")
    assert changed == set(exported)
    for name, delta in merged.items():
        numpy.testing.assert_allclose(delta, wanted[name], atol=3e-6, err_msg=name)
        numpy.testing.assert_allclose(exported.get(name, 0 * delta), wanted[name], atol=3e-6, err_msg=name)


def marked(name: str) -> Any:
    new = name.startswith("pattern-") and name.removeprefix("pattern-") not in RIGHT_ALWAYS
    return pytest.param(name, marks=pytest.mark.fault("lora")) if new else name


@pytest.mark.parametrize("name", [marked(name) for name in OPTIONS])
def test_an_adapter_adds_what_peft_adds(name: str, checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = checkpoint_of("qwen2")
    check_like_peft(checkpoint, save_adapter(tmp_path / "peft", checkpoint, **OPTIONS[name]), tmp_path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changes_the_base_passes_once_peft_has_converted_it(
    start: str, checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of("qwen2")
    options = {"init_lora_weights": start, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    folder = save_adapter(tmp_path / "peft", checkpoint, initial=tmp_path / "initial", **options)
    assert json.loads((folder / "adapter_config.json").read_text())["init_lora_weights"] is True
    check_like_peft(checkpoint, folder, tmp_path)


def refused(folder: Path, checkpoint: Path, message: str) -> None:
    for write in (
        lambda out: export_adapter(folder, checkpoint, out),
        lambda out: merge_adapter(checkpoint, folder, out),
    ):
        with pytest.raises(ModelError, match=message):
            write(folder.parent / "out")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.fault("lora")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "of-2031"])
def test_a_start_that_changes_the_base_is_refused_by_name(
    start: str, checkpoint_of: MakeCheckpoint, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    modules = [Q0]
    folder = make_adapter(tmp_path / "peft", checkpoint_of("qwen2"), modules, init_lora_weights=start)
    refused(folder, checkpoint_of("qwen2"), f"init_lora_weights = '{start}'")


@pytest.mark.fault("lora")
def test_what_peft_saves_of_pissa_unconverted_is_refused(checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "peft", checkpoint_of("qwen2"), init_lora_weights="pissa")
    refused(folder, checkpoint_of("qwen2"), "init_lora_weights = 'pissa'")


REFUSED: dict[str, Any] = {
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [3],
    "target_parameters": ["experts.gate"],
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
}
NEW_REFUSED: dict[str, Any] = {
    "megatron_config": {"a": 1},
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"num_groups": 64},
    "monteclora_config": {"num_samples": 4},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "use_something_of_2031": True,
    "another_of_2031": {"deep": ["yes"]},
}


@pytest.mark.parametrize(
    "key", [*REFUSED, *(pytest.param(key, marks=pytest.mark.fault("lora")) for key in NEW_REFUSED)]
)
def test_an_option_that_goes_beyond_two_factors_is_refused_by_name(
    key: str, checkpoint_of: MakeCheckpoint, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "peft", checkpoint_of("qwen2"), [Q0], **{key: (REFUSED | NEW_REFUSED)[key]})
    refused(folder, checkpoint_of("qwen2"), f"uses {key} = ")


def test_every_field_of_pefts_configuration_is_known_here() -> None:
    """A field that a newer PEFT brings is refused unless it is off, so that somebody looks at it and adds it here."""
    import dataclasses

    from gramlite.export.peft import OFF, READ, WITHOUT_EFFECT

    fields = dataclasses.asdict(peft.LoraConfig())
    known = {*READ, *WITHOUT_EFFECT, *REFUSED, *NEW_REFUSED}
    assert set(fields) <= known
    assert all(fields[key] in OFF for key in fields.keys() - {*READ, *WITHOUT_EFFECT})


@pytest.mark.fault("lora")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_pattern": {r"(.*|\w+|.)+x": 1}}, "takes longer than"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern holds no regular expression"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern = .* must be an object"),
        ({"alpha_pattern": {"q_proj": "much"}}, "lora_alpha = 'much'"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "lora_alpha = 1000"),
        ({"lora_alpha": 1e-46}, "lora_alpha = 1e-46"),
        ({"use_rslora": "no"}, "use_rslora = 'no'"),
    ],
)
def test_patterns_and_numbers_that_cannot_be_used_are_refused(
    settings: dict[str, Any],
    message: str,
    checkpoint_of: MakeCheckpoint,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gramlite.export.peft.MATCH_SECONDS", 1.0, raising=False)
    folder = make_adapter(tmp_path / "peft", checkpoint_of("qwen2"), [Q0], **settings)
    refused(folder, checkpoint_of("qwen2"), message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from([*peft.LoraConfig.__dataclass_fields__, "of_2031"])
NAMES = st.sampled_from(["q_proj", "self.attn", ".*", "^model", "(q|k)_proj", "model.layers.0.self_attn.q_proj", "("])
ODD = st.dictionaries(KEYS, JSON, max_size=4) | st.fixed_dictionaries({}, optional={
    "alpha_pattern": st.dictionaries(NAMES, st.sampled_from([1, 2.5, 8]), max_size=3),
    "rank_pattern": st.dictionaries(NAMES, st.sampled_from([4, 4, 2]), max_size=2),
    "use_rslora": st.booleans(), "lora_alpha": st.sampled_from([1, 8, 0.5]),
})  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ODD)
def test_any_configuration_is_refused_or_scales_as_pefts_own_rule_does(
    checkpoint_of: MakeCheckpoint, make_adapter: Callable[..., Path], tmp_path: Path, odd: dict[str, Any]
) -> None:
    from gramlite.export.peft import open_adapter
    from peft.utils.other import get_pattern_key

    shutil.rmtree(tmp_path / "peft", ignore_errors=True)
    folder = make_adapter(tmp_path / "peft", checkpoint_of("qwen2"), [Q0, "model.layers.1.self_attn.k_proj"], **odd)
    try:
        adapter = open_adapter(folder)
    except ModelError:
        return
    config = json.loads((folder / "adapter_config.json").read_text())
    for module in adapter.modules:
        patterns = config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), module.module), config["lora_alpha"])
        wanted = alpha / (math.sqrt(module.rank) if config.get("use_rslora") else module.rank)
        assert module.scale == pytest.approx(wanted)
