"""Asymmetric orthogonal prompting (AOP, Eq. 5): what the student reads, c_student = [v, c_vlm].

The teacher of an effect keeps the prompt it was trained with; the student reads a trigger v that no other
effect has, followed by a descriptive prompt c_vlm. Both follow from the configuration and its seed alone,
so that training, evaluation and serving agree; `clora prompts` puts them into a file, with c_vlm rewritten
by a vision model.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from clora.config import Config, EffectConfig
from clora.errors import InputError

Scheme = Literal["random", "rare"]

_SUFFIX_LETTERS = string.ascii_letters + string.digits
# Rare, and naming nothing that can be seen: a word such as "gossamer" would paint threads.
RARE_WORDS = tuple(
    """abeyance abnegate adduce aforesaid albeit aliquot apodictic aporia apposite arrogate ascribe
    axiomatic behoove cavil cogent cognate concomitant corollary demur derogate desultory dictum diffident
    dilatory disquisition elide enthymeme epistemic ergative erstwhile eschew evince exegesis exigent
    expiate extant forbear forthwith fungible gerund gnomic heretofore heuristic hitherto idem impugn
    imputed inchoate ineluctable inhere insofar jejune jussive laconic lemma litotes maxim metonymy modicum
    moiety moot nonce notwithstanding obviate onus parlance perforce pleonasm posit postulate precept
    proviso purport quiddity quorum rebut recondite redact refute reify salient sinecure sophistry syllogism
    synecdoche tacit tautology tenet thence trope usufruct vicarious whence wherefore
    """.split()
)
_MAX_DRAWS = 1000


@dataclass(frozen=True)
class EffectPrompt:
    """The prompts of one effect. `text` is c_vlm; `origin` says who wrote it."""

    name: str
    teacher_prompt: str
    trigger: str
    text: str
    origin: Literal["config", "vision model", "template", "teacher"]

    @property
    def student_prompt(self) -> str:
        """Eq. 5: trigger and text."""
        return student_prompt(self.trigger, self.text)


def make_trigger(name: str, seed: int, scheme: Scheme = "random", draw: int = 0) -> str:
    """The trigger of an effect, a pure function of its arguments; `draw` counts redraws after a collision.

    "random" is the paper's form (its Table 6), `<name_Xy5995>`; "rare" is two rare words, such as
    `idem-thence`, for text encoders that do badly with abstract tokens.
    """
    digest = hashlib.sha256(f"{seed}\n{name}\n{draw}".encode()).digest()
    if scheme == "random":
        return f"<{name}_{''.join(_SUFFIX_LETTERS[byte % len(_SUFFIX_LETTERS)] for byte in digest[:6])}>"
    first = int.from_bytes(digest[:4], "big") % len(RARE_WORDS)
    # An offset of 1 to n - 1 keeps the two words different.
    second = (first + 1 + int.from_bytes(digest[4:8], "big") % (len(RARE_WORDS) - 1)) % len(RARE_WORDS)
    return f"{RARE_WORDS[first]}-{RARE_WORDS[second]}"


def make_triggers(
    effects: Sequence[EffectConfig], seed: int, scheme: Scheme = "random", others: Iterable[str] = ()
) -> dict[str, str]:
    """A trigger for every effect, by name: its own where given, else drawn; no two differ only in case, nor does one
    that is drawn from one of the `others`, which other effects have."""
    triggers = {effect.name: effect.trigger for effect in effects if effect.trigger}
    taken = {trigger.casefold() for trigger in (*triggers.values(), *others)}
    for effect in effects:
        if effect.name in triggers:
            continue
        drawn = (make_trigger(effect.name, seed, scheme, draw) for draw in range(_MAX_DRAWS))
        trigger = next((trigger for trigger in drawn if trigger.casefold() not in taken), None)
        if trigger is None:
            raise InputError(f"effect '{effect.name}': no free trigger is left; set prompts.trigger_scheme=random")
        triggers[effect.name] = trigger
        taken.add(trigger.casefold())
    return {effect.name: triggers[effect.name] for effect in effects}


def student_prompt(trigger: str, text: str) -> str:
    """Eq. 5, [v, c_vlm]: the trigger before the text (joined as in Table 6; words get a space between).

    A text that already starts with the trigger is left as it is; an empty trigger adds nothing.
    """
    if not trigger or text.startswith(trigger):
        return text
    return f"{trigger}{text}" if trigger.endswith(">") else f"{trigger} {text}"


def compose_prompts(first: str, second: str) -> str:
    """The paper's sentence that applies two effects at once (Fig. 7), from their student prompts."""
    a, b = (prompt.strip().rstrip(".") for prompt in (first, second))
    return f"Please apply {a} to the input image, and then apply {b}."


def template_prompt(effect: EffectConfig) -> str:
    """c_vlm without a vision model: the effect's `student_prompt`, else its teacher prompt and criteria."""
    if effect.student_prompt:
        return effect.student_prompt
    return " ".join(_sentence(text) for text in (effect.prompt, effect.criteria) if text)


def _sentence(text: str) -> str:
    line = " ".join(text.split())
    return line if line.endswith((".", "!", "?", "。", "！", "？")) else f"{line}."


def effect_prompts(config: Config) -> list[EffectPrompt]:
    """The prompts of every effect, in order, without asking anyone: what training and the catalogue use.

    With `objective.aop: false` the student reads the teacher's prompt and there is no trigger.
    """
    if not config.objective.aop:
        return [EffectPrompt(effect.name, effect.prompt, "", effect.prompt, "teacher") for effect in config.effects]
    triggers = make_triggers(config.effects, config.seed, config.prompts.trigger_scheme)
    return [offline_prompt(effect, triggers[effect.name]) for effect in config.effects]


def offline_prompt(effect: EffectConfig, trigger: str) -> EffectPrompt:
    """Trigger and text of an effect without asking a vision model."""
    origin: Literal["config", "template"] = "config" if effect.student_prompt else "template"
    return EffectPrompt(effect.name, effect.prompt, trigger, template_prompt(effect), origin)
