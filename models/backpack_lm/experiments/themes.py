"""The 17 topics of the paper's section 6.3, each with the words that its code steers by: those of its name."""

from __future__ import annotations

THEMES: dict[str, tuple[str, ...]] = {
    "arts and culture": ("arts", "culture"),
    "business and entrepreneurs": ("business", "entrepreneurs"),
    "celebrity and pop culture": ("celebrity", "pop", "culture"),
    "diaries and daily life": ("diaries", "daily", "life"),
    "family": ("family",),
    "fashion and style": ("fashion", "style"),
    "film, tv and video": ("film", "tv", "video"),
    "fitness and health": ("fitness", "health"),
    "food and dining": ("food", "dining"),
    "gaming": ("gaming",),
    "music": ("music",),
    "news and social concern": ("news", "social", "concern"),
    "other hobbies": ("hobbies",),
    "relationships": ("relationships",),
    "sports": ("sports",),
    "travel and adventure": ("travel", "adventure"),
    "youth and student life": ("youth", "student", "life"),
}
