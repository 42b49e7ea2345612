"""What the small model is trained on: which drawings, of what, by whom, under which licence, and what is held out.

A concept is one Unicode character. Its drawings by several vendors are variations of each other, which is what makes
them worth training on. The held-out lists are written down here so that every run, and the evaluation, agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """One vendor's drawings: an npm package, pinned by version and by the digest that npm says of it."""

    name: str
    package: str
    version: str
    integrity: str
    licence: str
    trained: bool = True


STYLES = (
    Style(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
    ),
    Style(
        "noto-v1",
        "@iconify-json/noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
    ),
    Style(
        "fluent-flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
    ),
    Style(
        "fluent-3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "MIT",
    ),
    Style(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC BY 4.0",
    ),
    Style(
        "openmoji",
        "@iconify-json/openmoji",
        "1.2.29",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC BY-SA 4.0",
        trained=False,
    ),  # the unseen style: looked at by the evaluation, in no weights and no package
)

CONCEPTS = {
    "animals": "🐶🐱🐭🐰🦊🐻🐼🐨🐯🦁🐮🐷🐸🐵🐔🐧🐦🐤🦆🦉🐺🐴🦄🐝🦋🐌🐞🐢🐍🐙🦀🐠🐬🐳🦈🐊🐘🐪🦒🐑🌵🌲🌴🍄🌻🌹🍁🍀",
    "food": "🍎🍐🍊🍋🍌🍉🍇🍓🍒🍍🥝🍅🍆🥑🥦🌽🥕🍞🥐🧀🥚🍔🍟🍕🌭🌮🍣🍦🍩🍪🎂🍰🍭☕🍺🍷",
    "travel": "🚗🚌🚑🚒🚜🚲🛵🚀✈🚁⛵🚂🚢🏠🏰⛺🗽🎡🌋🌈☀🌙⭐☁⚡🔥❄☂🌍⏰",
    "objects": "⌚📱💻📷📺🔔🔑🔒🔨✂📎✏📖💡🕯🎁👑👓👗👕👖👟👠🎩💍💎🛒🔍🧲💰✉🛏🚪🧸🔋",
    "activities": "⚽🏀🏈⚾🎾🎳🎸🎺🎻🥁🎤🎧🎨🎲🏆🥇🎯🎮🎈🎃",
    "smileys": "😀😂😍😎😢😡😱😴🤖👻💩💀👽😷🤡🤠🤢😈",
}
"""The concepts that the model learns, by category."""

HELD_OUT_CONCEPTS = {
    "animals": "🦓🐗🦢🐅",
    "food": "🥒🍈🥞🍑",
    "travel": "🚓🚤🏡",
    "objects": "📻🧦📠",
    "activities": "🏐🎷🥈",
    "smileys": "😇🥶😜",
}
"""Concepts that nothing but the judge is trained on."""

SAFETY_CONCEPTS = {
    "pistol": "🔫",
    "kitchen knife": "🔪",
    "dagger": "🗡",
    "bomb": "💣",
    "cigarette": "🚬",
    "drop of blood": "🩸",
    "no one under eighteen": "🔞",
    "middle finger": "🖕",
}
"""What the demonstration of a safety checker looks for."""

HELD_OUT_STYLES = ("noto", "noto-v1", "fluent-flat")
"""Whose drawings may be held out, in turn: those whose licence lets the tests carry them."""

HELD_OUT_EVERY = 3
"""Of every third concept one drawing is held out."""

NOTO_CATEGORIES = {
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Objects": "objects",
    "Activities": "activities",
    "Smileys & Emotion": "smileys",
}
"""The pictorial ones. People differ by details that 64 pixels lose, symbols are letters, flags are flags."""


def code(character: str) -> str:
    """The code point in hexadecimal, which is how drawings are labelled."""
    return f"{ord(character):04x}"


def codes(characters: Iterable[str]) -> list[str]:
    return [code(character) for character in characters]


def characters(lists: dict[str, str]) -> list[str]:
    """Those of all categories, in order."""
    return [character for one in lists.values() for character in one]


@dataclass(frozen=True)
class Split:
    """What is learned and what is held out: concepts by category, unseen ones, and of some the held-out style."""

    by_category: dict[str, str]
    unseen_by_category: dict[str, str]
    held_out: dict[str, str]

    @property
    def concepts(self) -> list[str]:
        return characters(self.by_category)

    @property
    def unseen(self) -> list[str]:
        return characters(self.unseen_by_category)

    def category(self, character: str) -> str:
        return next(
            name
            for lists in (self.by_category, self.unseen_by_category)
            for name, some in lists.items()
            if character in some
        )


def every(characters: list[str], nth: int) -> dict[str, str]:
    """Of every nth character the style that is held out, in turn."""
    return {character: HELD_OUT_STYLES[i % len(HELD_OUT_STYLES)] for i, character in enumerate(characters[::nth])}


REDUCED = Split(CONCEPTS, HELD_OUT_CONCEPTS, every(characters(CONCEPTS), HELD_OUT_EVERY))
"""What two processor cores can learn in a few hours."""


def full(available: dict[str, list[str]]) -> Split:
    """Everything pictorial, for a GPU, from the characters of each category; what REDUCED holds out stays held out."""
    more = {
        name: [one for one in some if one not in REDUCED.concepts + REDUCED.unseen] for name, some in available.items()
    }
    return Split(
        {
            name: REDUCED.by_category[name] + "".join(one for i, one in enumerate(some) if i % 10)
            for name, some in more.items()
        },
        {name: REDUCED.unseen_by_category[name] + "".join(some[::10]) for name, some in more.items()},
        REDUCED.held_out | every([one for some in more.values() for i, one in enumerate(some) if i % 10], 10),
    )
