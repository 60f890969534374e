from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranking.test_rank import Strengths, judge_on

from gramlite import InputError
from gramlite.generation.decoder import softmax_first
from gramlite.integrations.trl import text_of, win_rate_reward


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_a_reward_is_the_win_rate_within_the_prompt() -> None:
    backend = Strengths(lean=0.2)
    reward = win_rate_reward(judge_on(backend), outcome="win")
    prompts = ["q", "other", "q", "q", "other", "q", "alone"]
    rewards = reward(
        prompts=prompts, completions=["1", "5", "3", "3", "4", "2", "9"],
        completion_ids=[[1]] * 7, trainer_state=None, ground_truth=["x"] * 7,
    )  # fmt: skip
    assert rewards == [0.0, 1.0, pytest.approx(2.5 / 3), pytest.approx(2.5 / 3), 0.0, pytest.approx(1 / 3), None]
    assert len(backend.asked) == 2 * (3 + 1), "the two equal completions are one"


def test_a_reward_may_be_the_probability() -> None:
    rewards = win_rate_reward(judge_on(Strengths()))(prompts=["q", "q"], completions=["1", "3"])
    assert rewards == [pytest.approx(softmax_first(-2), abs=1e-6), pytest.approx(softmax_first(2), abs=1e-6)]


def test_a_reward_against_a_reference_column() -> None:
    backend = Strengths()
    reward = win_rate_reward(judge_on(backend), reference="answer", outcome="win")
    rewards = reward(prompts=["q", "q", "q"], completions=["1", "3", "2"], answer=["2", said("2"), "2"])
    assert rewards == [0.0, 1.0, 0.5] and len(backend.asked) == 4
    with pytest.raises(InputError, match="no column 'answer'"):
        reward(prompts=["q"], completions=["1"])


def test_conversations_read_like_plain_text() -> None:
    plain, conversational = Strengths(), Strengths()
    expected = win_rate_reward(judge_on(plain))(prompts=["q", "q"], completions=["1", "2"])
    prompt = [{"role": "user", "content": "q"}]
    rewards = win_rate_reward(judge_on(conversational))(prompts=[prompt, prompt], completions=[said("1"), said("2")])
    assert rewards == expected and conversational.asked == plain.asked
    assert text_of([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "System: s\n\nUser: u"
    assert text_of([{"role": "user", "content": [{"type": "text", "text": "q"}]}]) == "q" and text_of([]) == ""
    with pytest.raises(InputError, match="reads text"):
        text_of([{"role": "user", "content": [{"type": "image", "image": object()}]}])


IMAGE = [{"role": "assistant", "content": [{"type": "image", "image": "x"}]}]
BAD = [
    IMAGE,
    [{"role": "assistant", "content": None}],
    [{"role": "assistant"}],
    [*said("2"), {"role": "user", "content": "more"}],
    [{"content": "2"}],
    ["2"],
    [],
    None,
    3,
]


@pytest.mark.fault("conversations")
@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_a_bad_completion_has_no_reward_and_those_beside_it_have_theirs(bad: Any) -> None:
    backend = Strengths()
    reward = win_rate_reward(judge_on(backend), outcome="win")
    rewards = reward(prompts=["q", "q", "q", "p", "p"], completions=["1", bad, "3", bad, said("2")])
    assert rewards == [0.0, None, 1.0, None, None] and len(backend.asked) == 2
    against = win_rate_reward(judge_on(Strengths()), reference="answer", outcome="win")
    rewards = against(prompts=["q"] * 4, completions=["1", bad, "3", "1"], answer=["2", "2", bad, said("0")])
    assert rewards == [0.0, None, None, 1.0]


@pytest.mark.fault("conversations")
def test_a_bad_prompt_takes_no_reward_from_others() -> None:
    reward = win_rate_reward(judge_on(Strengths()), outcome="win")
    assert reward(prompts=["q", IMAGE, "q", IMAGE], completions=["1", "1", "3", "3"]) == [0.0, None, 1.0, None]


@pytest.mark.fault("conversations")
def test_completions_may_repeat_the_prompt() -> None:
    plain, whole = Strengths(), Strengths()
    prompt = [{"role": "user", "content": "q"}]
    rewards = win_rate_reward(judge_on(whole))(prompts=[prompt] * 2, completions=[[*prompt, *said("1")], said("3")])
    assert rewards == win_rate_reward(judge_on(plain))(prompts=["q", "q"], completions=["1", "3"])
    assert whole.asked == plain.asked


@pytest.mark.fault("conversations")
def test_a_completion_with_tools_is_read_whole() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}
    tools = [call, {"role": "tool", "name": "f", "content": "3 C"}, *said("3 degrees.")]
    assert text_of(tools) == 'Assistant: f({"a": 1})\n\nTool: 3 C\n\nAssistant: 3 degrees.'


def test_no_verdict_is_no_reward() -> None:
    reward = win_rate_reward(judge_on(Strengths()), outcome="win")
    assert reward(prompts=["q"] * 3, completions=["1", "2\0", "3"]) == [0.0, None, 1.0]
    assert reward(prompts=["q"] * 2, completions=["", ""]) == [0.5, 0.5]
    with pytest.raises(InputError, match="2 prompts came with 1"):
        reward(prompts=["q"] * 2, completions=["1"])


@pytest.mark.slow
def test_trl_trains_on_the_reward(scripted: Path, tmp_path: Path) -> None:
    """One step of GRPOTrainer with a model of a few thousand weights that writes noise."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    import gramlite

    trained = tiny_policy(tmp_path)
    with gramlite.load(scripted, settings=gramlite.Settings(mode="direct")) as judge:
        logs = train_one_step(trained, win_rate_reward(judge), tmp_path)
    assert any("rewards/gramlite_win_rate/mean" in entry for entry in logs), json.dumps(logs)
    means = [entry["rewards/gramlite_win_rate/mean"] for entry in logs if "rewards/gramlite_win_rate/mean" in entry]
    assert means == [pytest.approx(0.5, abs=1e-4)], "what one wins the other loses"


def tiny_policy(folder: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghij"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    wrapped.save_pretrained(folder / "policy")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    return folder / "policy"


def train_one_step(policy: Path, reward: Any, folder: Path) -> list[dict[str, Any]]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=4, num_generations=4, max_completion_length=4,
        max_steps=1, logging_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "a b"}, {"prompt": "c d"}])
    trainer = GRPOTrainer(model=str(policy), reward_funcs=reward, args=arguments, train_dataset=data)
    trainer.train()
    return list(trainer.state.log_history)
