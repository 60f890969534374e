"""The judge: a backend, a template and settings, which together turn pairs into verdicts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gramlite.backends.protocol import Backend
from gramlite.errors import GramliteError, InputError, ModelError
from gramlite.generation.decoder import choice_tokens, encode_answer
from gramlite.generation.prompt import PROMPT_ENCODING, EncodedPrompt, common_prefix, encode_prompt
from gramlite.generation.scaffold import Scaffold
from gramlite.storage import sha256_cached

from .conclusion import conclude, conclude_order, mean_log_odds, winner_of
from .confidence import Calibration
from .engine import Engine
from .open_pair import OpenPair
from .pair import Identifier, Order, Pair, Verdict
from .settings import Settings, digest_without
from .template import Template, presented, screen
from .verdicts import Listener, Verdicts

__all__ = ["Judge", "Listener", "Settings", "mean_log_odds", "winner_of"]


class Judge:
    """Judges pairs. Make one with `gramlite.load`.

    One judge may be called from many threads and coroutines; their pairs are decoded together. `close` frees the model,
    for all judges on it. In a process that was forked since, every use raises GramliteError.
    """

    def __init__(
        self,
        backend: Backend,
        template: Template,
        scaffold: Scaffold,
        settings: Settings,
        model: Mapping[str, Any],
        *,
        adapter: str | None = None,
        parallel: int | None = None,
        rank: Callable[..., Any] | None = None,
    ) -> None:
        """`parallel` is how many sequences each caller may have decoded together, None as the settings have it; `rank`
        is the function that `Judge.rank` calls."""
        self.backend = backend
        self.template = template
        self.scaffold = scaffold
        self.settings = self._possible(settings)
        self.model = dict(model)
        self.adapter = adapter
        self.calibration: Calibration | None = None
        self._parallel = parallel
        self._rank = rank
        self._loaded = {adapter: self.model.get("adapter")}  # sha256 of the adapters as the open model has them
        self._grouped = False
        try:
            choice_tokens(backend.vocabulary, template.form)
        except ValueError as error:
            raise ModelError(f"The model cannot answer in this template's form: {error}.") from error
        self._preamble = self._encode(Pair("\u2402", "\u2402", "\u2402"), "ab").tokens
        self._engine = Engine(backend)

    def _possible(self, settings: Settings) -> Settings:
        if settings.mode == "think" and not self.template.form.thinks:
            return replace(settings, mode="direct")  # a verdict-only judge has nothing to think with
        return settings

    def with_settings(self, **changes: Any) -> Judge:
        """A judge on the same open model with some settings changed."""
        self._engine.require_open()
        other = copy.copy(self)  # not made anew: that asks the model, which another thread may be using
        other.settings = self._possible(replace(self.settings, **changes))
        other.model = dict(self.model)
        other._grouped = False
        other.calibration = None
        if self.calibration and self.calibration.belongs_to(other.model, other.settings_record):
            other.calibration = self.calibration
        return other

    def calibrated(self, calibration: Calibration) -> Judge:
        """A judge on the same open model whose margins, and so p_a and verdict, are rescaled by a fitted calibration.

        `with_settings` keeps it as long as it applies. Raises InputError for one of another model or other settings.
        """
        if not calibration.belongs_to(self.model, self.settings_record):
            raise InputError(
                "This calibration was fitted to another model or other settings. Run gramlite calibrate for this judge."
            )
        other = self.with_settings()
        other.calibration = calibration
        return other

    def with_adapter(self, adapter: str | Path | None) -> Judge:
        """A judge on the same open model with a LoRA adapter in GGUF form, or with none.

        Adapters stay loaded, so that judges with different ones may take turns. A calibration is not carried over.
        Raises ModelError for an adapter that does not fit the model or whose file changed since it was loaded,
        InputError where the model's format takes none, ResourceError when memory does not hold it.
        """
        other = self.with_settings()
        other.calibration = None
        other.adapter = str(adapter) if adapter else None
        if adapter and not Path(adapter).is_file():
            raise InputError(f"There is no adapter at {adapter}. Give the path of a GGUF adapter.")
        sha256 = sha256_cached(Path(adapter)) if adapter else None
        other.model = {key: value for key, value in self.model.items() if key != "adapter"}
        if sha256:
            other.model["adapter"] = sha256
        if not adapter:
            return other
        if not self.backend.capabilities.adapters:
            name = self.model.get("name")
            raise InputError(f"{name} ({self.model.get('format')}) takes no adapter while it is open; GGUF models do.")
        self._engine.call(partial(self._open_adapter, other.adapter, sha256))
        return other

    def _open_adapter(self, adapter: str | None, sha256: str | None) -> None:
        if self._loaded.get(adapter, sha256) != sha256:
            raise ModelError(f"{adapter} changed since it was loaded. Give the new adapter a name of its own.")
        self.backend.open_adapter(adapter)
        self._loaded[adapter] = sha256

    def grouped(self) -> Judge:
        """A judge on the same open model for pairs sorted by question and response_a: what neighbours share is kept."""
        other = self.with_settings()
        other._grouped = True
        return other

    @property
    def settings_record(self) -> dict[str, Any]:
        """Everything but the model that a verdict depends on."""
        sampled: dict[str, Any] = {"mode": self.settings.mode}
        if self.settings.mode == "think":
            sampled |= {"budget": self.settings.budget, "temperature": self.settings.sampled_at}
            sampled |= {"seed": self.settings.seed} if self.settings.sampled_at > 0 else {}
        record = {
            **sampled,
            "orders": self.settings.orders,
            "votes": self.settings.votes,
            "early_stop": self.settings.early_stop and self.settings.votes > 1,
            "confidence": self.settings.confidence,
            "delimiters": self.settings.delimiters,
            "template": {"name": self.template.name, "sha256": self.template.sha256},
            "scaffold": asdict(self.scaffold),
            "prompt_encoding": PROMPT_ENCODING,
        }
        if self.calibration:
            record["calibration"] = {"temperature": self.calibration.temperature, "bias": self.calibration.bias}
        return record

    @property
    def settings_hash(self) -> str:
        """Twelve hexadecimal digits that change with `settings_record`."""
        return digest_without(self.settings_record)

    def __call__(
        self, *, prompt: str, response_a: str, response_b: str, id: Identifier = None, on_text: Listener | None = None
    ) -> Verdict:
        """Judge one pair.

        `on_text` hears each order's rationale as it is written. Raises InputError for a pair that cannot be judged.
        """
        with closing(
            self.many([Pair(prompt, response_a, response_b, id=id)], on_text=on_text, strict=True)
        ) as verdicts:
            return next(verdicts)

    def many(
        self,
        pairs: Iterable[Pair],
        *,
        strict: bool = False,
        lookahead: bool = True,
        on_text: Listener | None = None,
    ) -> Verdicts:
        """Judge pairs lazily: an iterator, for `for` or `async for`, over one verdict each, in input order.

        A pair that cannot be judged yields a verdict with no winner and a reason; with `strict` it raises. With
        `lookahead` the next pairs are read while earlier ones are decoded, so that they run together; without it a
        pair is read only once all before it have been yielded, as an interactive pipe needs.
        """
        limit = self._parallel or self.settings.sequences
        return Verdicts(
            self._engine,
            pairs,
            open=partial(self._open, strict=strict, streams=on_text is not None),
            conclude=self._conclude,
            limit=limit,
            ahead=limit // len(self.settings.presented_orders) + 2 if lookahead else None,
            on_text=on_text,
        )

    async def aio(
        self, *, prompt: str, response_a: str, response_b: str, id: Identifier = None, on_text: Listener | None = None
    ) -> Verdict:
        """Judge one pair without keeping the event loop from running; otherwise as a call."""
        verdicts = self.many([Pair(prompt, response_a, response_b, id=id)], on_text=on_text, strict=True)
        return await anext(verdicts)

    def rank(
        self,
        *,
        prompt: str,
        completions: Sequence[str],
        method: Literal["best", "tournament", "full"] = "best",
        known: Any = None,
    ) -> Any:
        """Rank the completions of one prompt; see `gramlite.ranking.rank.rank`."""
        self._engine.require_open()
        if self._rank is None:
            raise GramliteError("This judge was made without a way to rank. Load it with gramlite.load(...).")
        return self._rank(self, prompt=prompt, completions=completions, method=method, known=known)

    def abort(self) -> None:
        """Stop what is running soon; safe to call from a signal's thread."""
        self._engine.abort()

    def close(self) -> None:
        """Free the model. What another thread is judging is stopped first; afterwards every call is refused.

        Closing again changes nothing, nor does closing in a forked child. Raises GramliteError inside a verdict of this
        very thread, as from `on_text`.
        """
        self._engine.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self, pair: Pair, *, strict: bool, streams: bool) -> OpenPair | Verdict:
        try:
            return self._prepare(pair, streams=streams)
        except GramliteError as error:
            if strict:
                raise
            return self._verdict(pair, reason=str(error))

    def _prepare(self, pair: Pair, *, streams: bool = False) -> OpenPair | Verdict:
        """Check and encode a pair, or settle it without the model."""
        pair.check()
        flags = tuple(f"empty:{name}" for name in ("response_a", "response_b") if not getattr(pair, name).strip())
        if pair.response_a == pair.response_b:
            return self._verdict(
                pair, winner="tie", p_a=0.5, margin=0.0, consistent=True,
                reason="the responses are identical", flags=("identical",),
            )  # fmt: skip
        shown, hits = screen(self.template, pair, self.settings.delimiters)
        prompts = {order: self._encode(shown, order) for order in self.settings.presented_orders}
        literals = dict.fromkeys(hit for prompt in prompts.values() for hit in prompt.literals)
        flags += tuple(dict.fromkeys([*hits, *(f"special:{name}:{text}" for name, text in literals)]))
        answer = encode_answer(self.backend.vocabulary, self.template.form, self.settings.mode)
        opened = OpenPair(
            pair=pair,
            settings=self.settings,
            prompts=prompts,
            answer=answer,
            flags=flags,
            splits={order: self._splits(shown, order, prompts, answer.opening) for order in prompts},
            adapter=self.adapter,
            alone=self.settings.mode == "direct" and self.backend.device.startswith("cpu"),
            streams=streams,
            calibration=self.calibration,
        )
        if self._grouped:
            opened.group = pair.prompt
        self._check_length(opened)
        return opened

    def _encode(self, pair: Pair, order: Order) -> EncodedPrompt:
        segments = self.template.segments(presented(pair, order))
        return encode_prompt(self.backend.vocabulary, self.scaffold.wrap(segments))

    def _stems(self, shown: Pair, order: Order, prompt: EncodedPrompt) -> frozenset[int]:
        """How many tokens a prompt shares with others of its question, and with others of its first response too."""
        same_first = replace(shown, response_b="\u2402") if order == "ab" else replace(shown, response_a="\u2402")
        same_question = replace(same_first, response_a="\u2402", response_b="\u2402")
        variants = (self._encode(variant, order) for variant in (same_first, same_question))
        return frozenset(common_prefix(prompt.tokens, variant.tokens) for variant in variants)

    def _splits(
        self, shown: Pair, order: Order, prompts: Mapping[Order, EncodedPrompt], opening: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The lengths of an order's beginning that other prompts share: all, the other order, a group, its own votes."""
        tokens = (*prompts[order].tokens, *opening)
        splits = {common_prefix(tokens, self._preamble)}
        if len(prompts) > 1:
            splits.add(common_prefix(*(prompt.tokens for prompt in prompts.values())))
        if self._grouped:
            splits |= self._stems(shown, order, prompts[order])
        if self.settings.votes > 1:
            splits.add(len(tokens))
        return tuple(sorted(split for split in splits if split > 0))

    def _check_length(self, opened: OpenPair) -> None:
        """Refuse a prompt that does not fit, before anything is computed; nothing is ever truncated."""
        context = self.backend.capabilities.context
        for order in opened.prompts:
            request = opened.request(order, 0)
            length, more = len(request.prompt), request.most_tokens
            if length + more > context:
                room = f" + {more:,}" if more else ""
                raise InputError(
                    f"{length:,}{room} tokens exceed the context of {context:,}. "
                    "Raise --context, lower --budget, or shorten the texts."
                )

    def _conclude(self, opened: OpenPair) -> Verdict:
        """Combine a pair's generations, un-swapping the order in which response_b stood first."""
        failures = [generation.reason for generation in opened.done.values() if not generation.reads]
        if failures:
            return self._verdict(opened.pair, reason=f"{failures[0]} ({self.model.get('name')})", flags=opened.flags)
        orders = tuple(
            conclude_order(
                order,
                [opened.done[key] for key in sorted(opened.done) if key[0] == order],
                prompt_ids=opened.prompts[order].tokens,
                calibration=self.calibration,
            )
            for order in self.settings.presented_orders
        )
        return self._verdict(opened.pair, flags=opened.flags, orders=orders, **conclude(orders))

    def _verdict(self, pair: Pair, **found: Any) -> Verdict:
        return Verdict(id=pair.id, model=self.model, settings=self.settings_hash, **found)
