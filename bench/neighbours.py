"""Other ways of asking the same judge, to be timed beside gramlite: plain llama-cpp-python and transformers.

Each is written as its documentation has it: a letter, its probability where that costs extra, and a rationale.
Every contender judges both orders of a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gramlite.errors import GramliteError, InputError
from gramlite.judging.pair import Pair

if TYPE_CHECKING:
    from gramlite.judging.judge import Judge

Contest = dict[str, Callable[[Sequence[Pair]], object]]  # what judges pairs, by the contender's name

LETTER, RATIONALE = "letter", "rationale"
PRECISIONS = {"transformers": "float32", "transformers:float32": "float32", "transformers:bfloat16": "bfloat16"}
NAMES = ("llama-cpp-python", *PRECISIONS)


def parse_against(text: str) -> list[str]:
    """The neighbours named, in order; raises InputError for one that is unknown."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in NAMES]:
        raise InputError(f"--against does not know {', '.join(unknown)}. It knows {', '.join(NAMES)}.")
    return list(dict.fromkeys(names))


def question(judge: Judge, pair: Pair, swap: bool) -> str:
    """The judge's own user message for one order of a pair."""
    from gramlite.judging.template import presented

    first, second = (pair.response_b, pair.response_a) if swap else (pair.response_a, pair.response_b)
    return "".join(
        segment.text for segment in judge.template.segments(presented(Pair(pair.prompt, first, second), "ab"))
    )


def both_orders(answer: Callable[[Pair, bool], object]) -> Callable[[Sequence[Pair]], object]:
    """What answers for one order, asked for both of every pair."""
    return lambda pairs: [answer(pair, swap) for pair in pairs for swap in (False, True)]


def llama_contest(judge: Judge, model: Path, *, threads: int, context: int, tokens: int) -> Contest:
    """llama-cpp-python as people use it: a probability by logprobs, a bare letter, and a rationale of up to `tokens`."""
    import llama_cpp

    if model.is_dir() or judge.model["format"] != "gguf":
        raise InputError("--against llama-cpp-python needs a GGUF file. Give one as -m, or drop it.")

    def open_model(logits_all: bool) -> Any:
        return llama_cpp.Llama(
            str(model), n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=logits_all, verbose=False
        )

    thinks = judge.settings.mode == "think"
    if thinks:
        chatting = open_model(False)

        def chat(pair: Pair, swap: bool) -> object:
            messages = [{"role": "user", "content": question(judge, pair, swap)}]
            return chatting.create_chat_completion(messages, max_tokens=tokens, temperature=0)

        return {f"llama-cpp-python, {RATIONALE}": both_orders(chat)}

    def complete(llama: Any, logprobs: int | None) -> Callable[[Pair, bool], object]:
        def ask(pair: Pair, swap: bool) -> object:
            prompt = judge.scaffold.before + question(judge, pair, swap) + judge.scaffold.after
            return llama.create_completion(
                prompt + judge.template.form.direct, max_tokens=1, temperature=0, logprobs=logprobs
            )

        return ask

    return {
        "llama-cpp-python, probability": both_orders(complete(open_model(True), 5)),
        f"llama-cpp-python, {LETTER}": both_orders(complete(open_model(False), None)),
    }


def transformers_contest(judge: Judge, checkpoint: Path, *, precision: str, threads: int, tokens: int) -> Contest:
    """transformers on the checkpoint the file was made of: one forward for a letter, or a greedy `generate`.

    `precision` is float32 or bfloat16. Raises GramliteError where torch or transformers is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise GramliteError(
            "--against transformers needs torch and transformers. Type: pip install 'gramlite[gptq]'"
        ) from error
    if not (checkpoint / "config.json").is_file():
        raise InputError(
            f"{checkpoint} is no checkpoint: it holds no config.json. Give --checkpoint a Hugging Face folder."
        )
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, precision)).eval()
    name = f"transformers {precision}"

    def encode(pair: Pair, swap: bool, ending: str) -> Any:
        text = judge.scaffold.before + question(judge, pair, swap) + judge.scaffold.after + ending
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")

    def letter(pair: Pair, swap: bool) -> object:
        with torch.inference_mode():
            logits = model(**encode(pair, swap, judge.template.form.direct), logits_to_keep=1).logits[0, -1]
        return [float(logits[tokenizer.convert_tokens_to_ids(choice)]) for choice in judge.template.form.choices]

    def rationale(pair: Pair, swap: bool) -> object:
        with torch.inference_mode():
            return model.generate(**encode(pair, swap, ""), max_new_tokens=tokens, do_sample=False)

    if judge.settings.mode == "think":
        return {f"{name}, {RATIONALE}": both_orders(rationale)}
    return {f"{name}, {LETTER}": both_orders(letter)}
