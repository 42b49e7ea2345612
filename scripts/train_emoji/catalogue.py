"""The training data: drawings by vendor with their licences, concepts by category, and the held-out splits.

A concept is one Unicode character. Its drawings by several vendors are variations of each other, which is what the
model learns. The held-out lists are constants, so that all runs and the evaluation use the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """One vendor's drawings: an npm package, pinned by version and integrity digest."""

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
    ),  # the unseen style, for evaluation only: not trained on and not distributed
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
"""Concepts that only the judge is trained on."""

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
"""Concepts of the demonstration safety checker."""

HELD_OUT_STYLES = ("noto", "noto-v1", "fluent-flat")
"""Styles whose drawings are held out, in turn: their licences allow the tests to include them."""

HELD_OUT_EVERY = 3
"""One drawing of every third concept is held out."""

NOTO_CATEGORIES = {
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Objects": "objects",
    "Activities": "activities",
    "Smileys & Emotion": "smileys",
}
"""The pictorial categories; people, symbols and flags are left out, whose details 64 pixels do not resolve."""


def code(character: str) -> str:
    """Return the code point in hexadecimal, the label of a drawing."""
    return f"{ord(character):04x}"


def codes(characters: Iterable[str]) -> list[str]:
    return [code(character) for character in characters]


def characters(lists: dict[str, str]) -> list[str]:
    """Return the characters of all categories, in order."""
    return [character for category in lists.values() for character in category]


@dataclass(frozen=True)
class Split:
    """Trained concepts and unseen concepts by category, and the held-out style of some of the trained ones."""

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
            for name, characters in lists.items()
            if character in characters
        )


def hold_out(characters: list[str], nth: int) -> dict[str, str]:
    """Return the held-out style of every nth character, in turn."""
    return {character: HELD_OUT_STYLES[i % len(HELD_OUT_STYLES)] for i, character in enumerate(characters[::nth])}


REDUCED = Split(CONCEPTS, HELD_OUT_CONCEPTS, hold_out(characters(CONCEPTS), HELD_OUT_EVERY))
"""The split that two CPU cores can train on in a few hours."""


def full(available: dict[str, list[str]]) -> Split:
    """Split all pictorial characters by category, for training on a GPU; a superset of REDUCED in each of its parts."""
    more = {
        name: [char for char in chars if char not in REDUCED.concepts + REDUCED.unseen]
        for name, chars in available.items()
    }
    return Split(
        {
            name: REDUCED.by_category[name] + "".join(char for i, char in enumerate(chars) if i % 10)
            for name, chars in more.items()
        },
        {name: REDUCED.unseen_by_category[name] + "".join(chars[::10]) for name, chars in more.items()},
        REDUCED.held_out | hold_out([char for chars in more.values() for i, char in enumerate(chars) if i % 10], 10),
    )
