"""The judge: a backend, a template and settings, which together turn pairs into verdicts."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gramlite.backends.protocol import Backend, HoldsPrompts, TakesAdapters
from gramlite.errors import GramliteError, InputError, ModelError
from gramlite.generation.decoder import Decoder, choice_tokens, describe
from gramlite.generation.prompt import PROMPT_ENCODING, EncodedPrompt, common_prefix, encode_prompt
from gramlite.generation.request import Request
from gramlite.generation.scaffold import Scaffold
from gramlite.storage import sha256_cached

from .conclusion import conclude, conclude_order, mean_log_odds, winner_of
from .confidence import Calibration
from .open_pair import OpenPair
from .pair import Identifier, Order, OrderVerdict, Pair, Verdict, Winner
from .settings import FEW_SEQUENCES, OPEN_PAIRS, Settings
from .template import Template, presented, screen
from .turn import Turn

if TYPE_CHECKING:
    from gramlite.ranking.rank import KnownComparisons, Ranking

__all__ = ["Judge", "Listener", "Settings", "mean_log_odds", "winner_of"]

Listener = Callable[[Order, str], None]
MOST_READY = 256  # verdicts that wait for an earlier pair's; beyond them no more pairs are read


class Judge:
    """Judges pairs. Make one with `gramlite.load`.

    One judge may be called from many threads; calls wait for each other. `close` frees the model, for all judges on it.
    In a process that was forked since, every use raises GramliteError.
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
    ) -> None:
        self.backend = backend
        self.template = template
        self.scaffold = scaffold
        self.settings = self._possible(settings)
        self.model = dict(model)
        self.adapter = adapter
        self._turn = Turn()
        self._loaded = {adapter: self.model.get("adapter")}  # sha256 of the adapters as the open model has them
        self._grouped = False
        self.calibration: Calibration | None = None
        try:
            choice_tokens(backend.vocabulary, template.form)
        except ValueError as error:
            raise ModelError(f"The model cannot answer in this template's form: {error}.") from error
        self._preamble = self._encode(Pair("\u2402", "\u2402", "\u2402"), "ab").tokens

    def _possible(self, settings: Settings) -> Settings:
        if settings.mode == "think" and not self.template.form.thinks:
            return replace(settings, mode="direct")  # a verdict-only judge has nothing to think with
        return settings

    def with_settings(self, **changes: Any) -> Judge:
        """A judge on the same open model with some settings changed."""
        self._turn.require_open()
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
        with self._turn, self._turn.using():
            if self._loaded.get(other.adapter, sha256) != sha256:
                raise ModelError(f"{adapter} changed since it was loaded. Give the new adapter a name of its own.")
            other._take_model()
            self._loaded[other.adapter] = sha256
        return other

    def _take_model(self) -> None:
        """Make the open model this judge's own: another judge may have left its adapter in it."""
        if isinstance(self.backend, TakesAdapters):
            self.backend.use_adapter(self.adapter)
        elif self.adapter:
            name = self.model.get("name")
            raise InputError(f"{name} ({self.model.get('format')}) takes no adapter while it is open; GGUF models do.")

    def grouped(self) -> Judge:
        """A judge on the same open model for pairs sorted by question and response_a: what neighbours share is kept."""
        other = self.with_settings()
        other._grouped = True
        return other

    @property
    def settings_record(self) -> dict[str, Any]:
        """Everything but the model that a verdict depends on."""
        sampling = describe(self.settings.sampling(self.settings.seed))
        record = {
            **sampling,
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
        return hashlib.sha256(json.dumps(self.settings_record, sort_keys=True).encode()).hexdigest()[:12]

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
    ) -> Generator[Verdict, None, None]:
        """Judge pairs lazily and yield one verdict each, in input order.

        A pair that cannot be judged yields a verdict with no winner and a reason; with `strict` it raises. With
        `lookahead` the next pairs are read while earlier ones are decoded, so that they run together; without it a
        pair is read only once all before it have been yielded, as an interactive pipe needs.
        """
        return self._turn.run(self._verdicts(pairs, strict, lookahead, on_text))

    def rank(
        self,
        *,
        prompt: str,
        completions: Sequence[str],
        method: Literal["best", "tournament", "full"] = "best",
        known: KnownComparisons | None = None,
    ) -> Ranking:
        """Rank the completions of one prompt; see `gramlite.ranking.rank.rank`."""
        from gramlite.ranking.rank import rank

        return rank(self, prompt=prompt, completions=completions, method=method, known=known)

    def abort(self) -> None:
        """Stop what is running soon; safe to call from a signal's thread."""
        self._turn.stop()
        self.backend.abort()

    def close(self) -> None:
        """Free the model. What another thread is judging is stopped first; afterwards every call is refused.

        Closing again changes nothing, nor does closing in a forked child. Raises GramliteError inside a verdict of this
        very thread, as from `on_text`.
        """
        self._turn.close(stop=self.backend.abort, free=self.backend.close)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _verdicts(
        self, pairs: Iterable[Pair], strict: bool, lookahead: bool, on_text: Listener | None
    ) -> Generator[Verdict, None, None]:
        self._take_model()
        if lookahead:
            yield from self._run(pairs, strict, on_text)
        else:
            for pair in pairs:
                yield from self._run([pair], strict, on_text)

    def _run(self, pairs: Iterable[Pair], strict: bool, on_text: Listener | None) -> Iterator[Verdict]:
        """Judge pairs, read ahead as far as the backend has room; verdicts come out as soon as they are next in line.

        A pair that is settled without the model has nothing to come back from the backend. Where its verdict is next,
        the requests end, so that it comes out, and begin again behind it.
        """
        opened: dict[int, OpenPair] = {}
        ready: dict[int, Verdict] = {}
        work: dict[int, tuple[int, Order, int]] = {}
        keys = itertools.count()
        coming = enumerate(pairs)
        emitted = 0
        paused = True

        def next_vote(*, ahead: bool = False) -> tuple[int, Order, int] | None:
            for number, one in opened.items():
                if found := one.next_vote(ahead=ahead):
                    return number, *found
            return None

        def next_in_line() -> Iterator[Verdict]:
            nonlocal emitted
            while emitted in ready:
                yield ready.pop(emitted)
                emitted += 1

        def requests() -> Iterator[Request | None]:
            nonlocal paused
            while True:
                self._turn.require_going()
                paused = emitted in ready
                wanted = next_vote()
                full = sum(one.may_want_more for one in opened.values()) >= OPEN_PAIRS or len(ready) >= MOST_READY
                index, pair = (-1, None) if wanted or full or paused else next(coming, (-1, None))
                if not wanted and pair is None:
                    if not work:
                        return
                    wanted = next_vote(ahead=True) if len(work) < FEW_SEQUENCES else None
                if wanted:
                    index, order, vote = wanted
                    key = next(keys)
                    work[key] = wanted
                    yield self._request(key, opened[index], order, vote, on_text)
                elif pair is None:
                    yield None  # whether a pair takes more votes depends on those that are still running
                else:
                    prepared = self._open(pair, strict)
                    if isinstance(prepared, Verdict):
                        ready[index] = prepared
                    else:
                        opened[index] = prepared

        while paused:
            paused = False
            for key, generation in self.backend.generate(requests()):
                index, order, vote = work.pop(key)
                if index not in opened:
                    continue  # its pair was settled without it
                current = opened[index]
                current.done[order, vote] = generation
                if current.settled():
                    ready[index] = self._settle(opened.pop(index))
                yield from next_in_line()
            assert not (opened or work), "the backend ended before every pair was decided"
            yield from next_in_line()

    def _settle(self, opened: OpenPair) -> Verdict:
        """The verdict of a pair that needs no more; what it asked for in vain is called off."""
        for request in opened.requests:
            request.decoder.cancel()
            if isinstance(self.backend, HoldsPrompts):
                self.backend.let_go(request.prompt)
        return self._conclude(opened)

    def _open(self, pair: Pair, strict: bool) -> OpenPair | Verdict:
        try:
            return self._prepare(pair)
        except GramliteError as error:
            if strict:
                raise
            return self._verdict(pair, reason=str(error))

    def _prepare(self, pair: Pair) -> OpenPair | Verdict:
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
        for prompt in prompts.values():
            self._check_length(prompt)
        stems = {order: self._stems(shown, order, prompt) for order, prompt in prompts.items()} if self._grouped else {}
        flags += tuple(dict.fromkeys([*hits, *(f"special:{name}:{text}" for name, text in literals)]))
        return OpenPair(pair, self.settings, flags, prompts, stems, self.calibration)

    def _encode(self, pair: Pair, order: Order) -> EncodedPrompt:
        segments = self.template.segments(presented(pair, order))
        return encode_prompt(self.backend.vocabulary, self.scaffold.wrap(segments))

    def _stems(self, shown: Pair, order: Order, prompt: EncodedPrompt) -> frozenset[int]:
        """How many tokens a prompt shares with others of its question, and with others of its first response too."""
        same_first = replace(shown, response_b="\u2402") if order == "ab" else replace(shown, response_a="\u2402")
        same_question = replace(same_first, response_a="\u2402", response_b="\u2402")
        variants = (self._encode(variant, order) for variant in (same_first, same_question))
        return frozenset(common_prefix(prompt.tokens, variant.tokens) for variant in variants)

    def _check_length(self, prompt: EncodedPrompt) -> None:
        """Refuse a prompt that does not fit, before anything is computed; nothing is ever truncated."""
        decoder = Decoder(self.backend.vocabulary, self.template.form, self.settings.sampling())
        length = len(prompt.tokens) + len(decoder.prefix)
        if length + decoder.most_tokens > self.backend.context:
            room = f" + {decoder.most_tokens:,}" if decoder.most_tokens else ""
            raise InputError(
                f"{length:,}{room} tokens exceed the context of {self.backend.context:,}. "
                "Raise --context, lower --budget, or shorten the texts."
            )

    def _request(self, key: int, opened: OpenPair, order: Order, vote: int, on_text: Listener | None) -> Request:
        decoder = Decoder(
            self.backend.vocabulary,
            self.template.form,
            self.settings.sampling(self._seed(opened.pair, order, vote)),
            on_text=(lambda text: on_text(order, text)) if on_text and vote == 0 else None,
        )
        tokens = (*opened.prompts[order].tokens, *decoder.prefix)
        preamble = common_prefix(tokens, self._preamble)
        splits = {preamble}
        if len(opened.prompts) > 1:
            splits.add(common_prefix(*(prompt.tokens for prompt in opened.prompts.values())))
        splits |= opened.stems.get(order, frozenset())
        if self.settings.votes > 1:
            splits.add(len(tokens))
        usable = tuple(sorted(split for split in splits if split > 0))
        opens_pair = order == self.settings.presented_orders[0] and vote == 0
        reuse = preamble if opens_pair and not self._grouped else None
        opened.requests.append(Request(key, tokens, decoder, usable, reuse))
        return opened.requests[-1]

    def _seed(self, pair: Pair, order: Order, vote: int) -> int:
        """A seed of its own for every generation, the same whatever is judged beside it."""
        text = json.dumps([self.settings.seed, pair.prompt, pair.response_a, pair.response_b, order, vote])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    def _conclude(self, opened: OpenPair) -> Verdict:
        """Combine a pair's generations, un-swapping the order in which response_b stood first."""
        failures = [generation.reason for generation in opened.done.values() if generation.margin is None]
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

    def _verdict(
        self,
        pair: Pair,
        *,
        winner: Winner | None = None,
        p_a: float | None = None,
        margin: float | None = None,
        consistent: bool | None = None,
        reason: str | None = None,
        flags: tuple[str, ...] = (),
        orders: tuple[OrderVerdict, ...] = (),
    ) -> Verdict:
        return Verdict(
            id=pair.id, winner=winner, p_a=p_a, margin=margin, consistent=consistent, reason=reason, flags=flags,
            orders=orders, model=self.model, settings=self.settings_hash,
        )  # fmt: skip
