"""The effects of the tiny world: image edits with known ground truth, many with a random outcome.

As in collections of real LoRAs, groups of effects share one vague teacher prompt ("change the style"), so
that a student told the same words could not tell them apart; the student prompts are all different.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from clora.tiny.effects import overlays, shapes, styles
from clora.tiny.effects import surroundings as settings
from clora.tiny.world.drawing import Array
from clora.tiny.world.scenes import Rendered

Apply = Callable[[Rendered, np.random.Generator], Array]


@dataclass(frozen=True)
class Effect:
    """One edit: what the teacher and the student are told, how an outcome is judged, and the edit itself.

    `random` says that outcomes differ between generators; the others are the same for all of them.
    """

    name: str
    family: str
    prompt: str
    student_prompt: str
    criteria: str
    random: bool
    apply: Apply


def apply_effect(effect: Effect, rendered: Rendered, rng: np.random.Generator) -> Array:
    """One outcome of the effect on a scene: (H, W, 3) float32 in [0, 1]."""
    return np.clip(effect.apply(rendered, rng), 0, 1).astype(np.float32)


MOVE_THINGS = {"frame", "geometry", "layout"}
READ_WHERE_THINGS_ARE = {"background", "subject", "overlay"}
TWO = " + "


def find_effect(name: str) -> Effect:
    """An effect of the world by name, or two applied in turn: `"sepia + snow"` is snow on the sepia picture.

    Raises ValueError for a name the world lacks, and for a second effect that looks for a subject which the first has
    moved.
    """
    if name in EFFECTS:
        return EFFECTS[name]
    parts = name.split(TWO)
    if len(parts) != 2 or any(part not in EFFECTS for part in parts):
        raise ValueError(f"{name!r} is no effect of the tiny world, nor two joined by {TWO!r}; see `EFFECTS`")
    first, second = (EFFECTS[part] for part in parts)
    if first.family in MOVE_THINGS and second.family in READ_WHERE_THINGS_ARE:
        raise ValueError(f"{second.name} needs the subject where it was, and {first.name} moves it; turn the two round")

    def apply(rendered: Rendered, rng: np.random.Generator) -> Array:
        return second.apply(rendered._replace(image_HW3=apply_effect(first, rendered, rng)), rng)

    return Effect(
        name,
        "two",
        f"{first.prompt} and {second.prompt}",
        f"{first.student_prompt}, and then {second.student_prompt}",
        f"{first.criteria} {second.criteria}",
        first.random or second.random,
        apply,
    )


_STYLE = "change the style"
_ART = "make it artistic"
_COLORS = "change the colors"
_LIGHT = "change the light"
_FRAME = "put it in a frame"
_BACK = "change the background"
_SUBJECT = "transform the subject"
_SHAPE = "bend the picture"
_LAYOUT = "transform the layout"
_WEATHER = "change the weather"
_FUN = "add something fun"

# The module that draws each family.
_DRAWN_BY: dict[str, ModuleType] = {
    "colour": styles,
    "line": styles,
    "texture": styles,
    "frame": settings,
    "background": settings,
    "subject": settings,
    "geometry": shapes,
    "layout": shapes,
    "overlay": overlays,
}

# Name (also the function that draws it; a star marks a random outcome), teacher and student prompt, criteria.
_Row = tuple[str, str, str, str]
_TABLE: dict[str, tuple[_Row, ...]] = {
    "colour": (
        ("sepia", _COLORS, "turn it into an old brown sepia photo with warm faded paper tones",
         "The whole picture is in brown sepia tones with the content unchanged."),
        ("grayscale", "make it black and white",
         "make it a black and white photo with strong grays and no color",
         "The picture has no colour and its content is unchanged."),
        ("invert", _COLORS, "invert every color like a photo negative, light becomes dark",
         "Every colour is replaced by its opposite, as in a negative."),
        ("duotone *", _COLORS, "print the photo in only two bold colors, one dark and one light",
         "The picture is made of shades between exactly two clearly different colours."),
        ("thermal", _COLORS, "show it through a heat camera with purple, red, orange and yellow",
         "Brightness is shown as heat colours from violet over red to yellow."),
        ("posterise", _COLORS, "reduce it to a few flat bold poster colors with hard steps",
         "The picture consists of few flat saturated colours."),
        ("night_vision", "use night vision",
         "view it through green night vision goggles with a dark round edge",
         "The picture is green on black inside a round dark border."),
        ("cross_process", _LIGHT, "give it a cross processed film look with strong yellow and blue shift",
         "Colours are shifted as in cross processed film, with yellow highlights and blue shadows."),
        ("moonlight", _LIGHT, "turn day into a dark blue night with a bright full moon in the corner",
         "The picture is dark and blue, with a full moon in the upper right corner."),
        ("hue_spin *", _COLORS, "rotate all hues so that everything gets strange new rainbow colors",
         "All hues are turned by one angle while brightness and shapes are kept."),
        ("party_lights *", _LIGHT, "light the scene with two strong colored club lamps from left and right",
         "The left and right sides are lit by two different vivid colours."),
        ("spotlight *", _LIGHT, "leave the scene in the dark with one round spotlight beam somewhere",
         "Everything is dark but for one round spot of light."),
    ),
    "line": (
        ("pencil_sketch", _STYLE, "draw it as a gray pencil sketch on white paper",
         "Gray outlines on white paper show the content."),
        ("neon_edges *", _ART, "trace the outlines with glowing neon tubes on a black wall",
         "The outlines glow in one neon colour on black."),
        ("chalkboard", _ART, "draw it with white chalk on a dark green school board",
         "White chalk outlines on a dark green board show the content."),
        ("blueprint", "draw a plan", "draw it as an engineering blueprint, white lines on blue grid paper",
         "White outlines on blue paper with a grid show the content."),
        ("comic_ink", _STYLE, "draw it as a bright comic picture with thick black ink outlines",
         "Flat bright colours with thick black outlines."),
    ),
    "texture": (
        ("halftone", _ART, "print it as newspaper halftone with black dots of changing size",
         "The picture is made of black dots of varying size on pale paper."),
        ("risograph *", _ART, "print it as a misaligned riso poster with two overlapping inks",
         "Two inks on paper, the second layer visibly displaced."),
        ("pixel_blocks", _STYLE, "break it into big square pixel blocks",
         "The picture is made of large single-coloured squares."),
        ("game_boy", "make it retro",
         "make it a retro handheld game screen with four greens and small pixels",
         "Small square pixels in four shades of green."),
        ("stained_glass *", _STYLE, "make it a stained glass window of bright pieces with dark lead lines",
         "Irregular vivid glass pieces separated by dark lines."),
        ("mosaic", _ART, "lay it out as a tile mosaic of small diamonds with white gaps",
         "Diamond-shaped tiles separated by white joints."),
        ("oil_paint *", _STYLE, "paint it in oil with thick slanted brush strokes",
         "Visible brush strokes in one direction with varied tones."),
        ("knit", _ART, "knit it as a cozy wool sweater with small v stitches",
         "The picture is made of rows of V-shaped stitches."),
        ("old_tv", "show it on a screen",
         "show it on an old curved tube tv with scan lines and color fringes",
         "Scan lines, colour fringes and a rounded dark border."),
        ("watercolor *", _STYLE, "paint it in pale watercolor that leaves the torn paper edge white",
         "Pale washes inside an irregular blot on white paper."),
        ("glitch *", "break the signal",
         "corrupt it with digital glitch bands shifted sideways and split colors",
         "Horizontal bands are shifted sideways with separated colours."),
    ),
    "frame": (
        ("polaroid", _FRAME, "show it as a tilted instant camera print with a wide white bottom",
         "A tilted white instant print holds the picture."),
        ("film_strip", _FRAME, "show it as one shot on a black film strip with white holes",
         "A black film strip with rows of holes holds the picture."),
        ("oval_portrait", _FRAME, "put it in an antique oval cutout with cream card and a brown line",
         "An oval opening in cream card shows the picture."),
        ("wooden_frame", _FRAME, "hang it in a thick brown wooden picture frame",
         "A brown wooden frame surrounds the whole picture."),
        ("color_frame *", _FRAME, "surround it with a thick wavy frame in one bright color",
         "A thick scalloped frame in one vivid colour surrounds the picture."),
        ("flower_wreath *", _FRAME, "surround it with a wreath of leaves and blossoms",
         "Flowers and leaves run along the border."),
        ("pinned_photo *", "pin it to a board", "pin it as a crooked printed photo to a colored board",
         "A crooked white-edged print hangs on a plain board with a pin."),
    ),
    "background": (
        ("beach", _BACK, "move the subject to a sunny beach with blue sea and yellow sand",
         "The unchanged subject is in front of sea and sand."),
        ("forest", "go to the woods", "move the subject into a green forest with many fir trees",
         "The unchanged subject is in front of fir trees."),
        ("travel *", _BACK, "send the subject on a journey to mountains, sunset, city lights or meadow",
         "The unchanged subject is in one of four places: mountains, sunset, city, meadow."),
        ("outer_space", _BACK, "move the subject to outer space with stars and an orange ringed planet",
         "The unchanged subject is before a starry sky with a ringed planet."),
        ("sunburst *", _BACK, "put bold two color sun rays behind the subject",
         "Rays in two colours spread from behind the unchanged subject."),
        ("candy_stripes *", _BACK, "put broad candy stripes behind the subject",
         "Broad stripes in two colours are behind the unchanged subject."),
        ("studio_color *", _BACK, "put a plain vivid studio backdrop behind the subject",
         "A plain vivid colour is behind the unchanged subject."),
        ("sticker", "cut it out", "cut the subject out as a sticker with a white outline on mint paper",
         "The subject has a white outline on a plain mint ground."),
        ("underwater *", "dive down", "sink the subject into deep blue water with light beams and bubbles",
         "The blue-tinted subject is in water with beams of light and bubbles."),
    ),
    "subject": (
        ("gold_statue", _SUBJECT, "turn only the subject into a shiny gold statue",
         "The subject is golden, its background unchanged."),
        ("ghost", _SUBJECT, "turn the subject into a pale glowing blue ghost in the gloom",
         "The subject is a translucent glowing blue before a darkened background."),
        ("stone_statue", _SUBJECT, "carve only the subject out of rough gray stone",
         "The subject is gray stone, its background unchanged."),
        ("rainbow_subject", _SUBJECT, "color only the subject with rainbow bands from top to bottom",
         "The subject shows rainbow colours from top to bottom, its background unchanged."),
        ("zombie", _SUBJECT, "make only the subject a sick green zombie",
         "The subject is in greens, its background unchanged."),
        ("silhouette", "hide the face", "show the subject only as a black shadow shape with a warm rim glow",
         "The subject is black with a warm glow around it."),
        ("paint_bucket *", _SUBJECT, "dip only the subject in one vivid paint color",
         "The subject is in shades of one vivid colour, its background unchanged."),
    ),
    "geometry": (
        ("mirror_half", "mirror it", "mirror the top half onto the bottom half like a playing card",
         "The lower half is the mirror image of the upper half."),
        ("upside_down", "turn it over", "flip the picture upside down",
         "The picture stands on its head."),
        ("quarter_turn *", "rotate it", "rotate the picture a quarter turn to the left or right",
         "The picture is rotated by 90 degrees."),
        ("swirl *", _SHAPE, "twist the middle into a strong spiral swirl",
         "The middle of the picture is twisted into a spiral."),
        ("fisheye", _SHAPE, "view it through a round fisheye lens with a black rim",
         "The picture bulges inside a circle on black."),
        ("tile_2x2", "repeat it", "repeat the same small picture four times in a grid",
         "Four equal small copies fill the picture."),
        ("kaleidoscope", _SHAPE, "look through a kaleidoscope with six mirrored sectors",
         "Six mirrored sectors meet in the middle."),
        ("close_up", "zoom in", "zoom in very close on the face",
         "The face fills the whole picture."),
        ("ripple", _SHAPE, "distort it with wavy ripples like a reflection on water",
         "The picture is bent by regular waves."),
    ),
    "layout": (
        ("pop_art *", _LAYOUT, "make a pop art grid of four copies, each with another wild palette",
         "Four copies in four different loud palettes."),
        ("comic_strip", _LAYOUT, "lay it out as a comic page with three framed panels and close ups",
         "Three black-edged panels on white show the whole and close-ups."),
        ("triptych *", _LAYOUT, "cut it into three tall strips, mix their order and push them up and down",
         "Three vertical strips in a wrong order, each displaced vertically."),
        ("sliced", _LAYOUT, "slice it into thin rows that slide left and right in turn",
         "Rows are displaced alternately to the left and right."),
        ("half_negative *", "split it", "show one half normal and the other half as a negative",
         "Exactly one half is a negative."),
        ("inset *", _LAYOUT, "add a small face close up in a bordered corner window",
         "A bordered close-up lies over one corner of the unchanged picture."),
        ("puzzle *", _LAYOUT, "shuffle it like a sliding puzzle of nine square pieces",
         "Nine square pieces of the picture are in a mixed-up order."),
    ),
    "overlay": (
        ("rain *", _WEATHER, "let heavy rain streaks fall over a dark wet scene",
         "Slanted pale streaks lie over the darkened picture."),
        ("snow *", _WEATHER, "let thick white snow flakes fall in a cold pale light",
         "White flakes are scattered over the pale picture."),
        ("fog", _WEATHER, "cover it with thick white fog rising from the ground",
         "White fog hides the picture more and more towards the bottom."),
        ("bubbles *", "blow bubbles", "float large shiny soap bubbles all over it",
         "Large translucent bubbles lie over the unchanged picture."),
        ("confetti *", _FUN, "throw bright paper confetti all over it",
         "Small coloured paper scraps are scattered over the unchanged picture."),
        ("balloons *", _FUN, "add five big party balloons on strings",
         "Five balloons on strings lie over the unchanged picture."),
        ("hearts *", _FUN, "add floating love hearts in a rosy light",
         "Hearts are scattered over the rosy picture."),
        ("hat *", _FUN, "put a funny hat on the head, a cone, crown, top hat or winter hat",
         "A hat sits on the head and the rest is unchanged."),
        ("sunglasses *", _FUN, "put big cool sunglasses on the eyes",
         "Large sunglasses cover the eyes and the rest is unchanged."),
    ),
}  # fmt: skip


def _build() -> dict[str, Effect]:
    effects = {}
    for family, rows in _TABLE.items():
        for starred, prompt, student_prompt, criteria in rows:
            name = starred.removesuffix(" *")
            apply: Apply = getattr(_DRAWN_BY[family], name)
            effects[name] = Effect(name, family, prompt, student_prompt, criteria, name != starred, apply)
    return effects


EFFECTS: dict[str, Effect] = _build()
