# SPDX-License-Identifier: Apache-2.0
"""A small LLaVA-format folder of real photographs: those that come inside the scikit-image wheel, captioned here.

Only pictures whose notes in scikit-image say that they are in the public domain, CC0, or without known copyright
restrictions are taken; the reason stands beside each. Files are copied byte for byte.
"""

import importlib.resources
import json
from pathlib import Path

from models.contract.errors import DataError
from models.datasets.prepare.llava import PRETRAIN_JSON

PROMPTS = (
    "Describe the image briefly.",
    "What is in the picture?",
    "Write a short caption.",
    "Look closely: what do you see?",
)

PHOTOS: dict[str, tuple[str, tuple[str, str, str, str]]] = {
    "astronaut.png": ("NASA, public domain", (
        "a smiling astronaut in an orange suit",
        "an astronaut with short hair in front of a flag and a model shuttle",
        "portrait of an astronaut with her helmet",
        "a person in an orange space suit, a flag on the left and a rocket on the right")),
    "camera.png": ("CC0 by the photographer", (
        "a man looks through a camera on a tripod",
        "a photographer in a dark coat on a lawn",
        "black and white picture of a man with a camera",
        "a man in a coat bends over a camera, towers far behind him")),
    "chelsea.png": ("CC0 by the photographer", (
        "close view of a tabby cat",
        "the face of a striped cat with green eyes",
        "a cat looks to the right",
        "a brown tabby cat with whiskers and a pink nose")),
    "coffee.png": ("CC0 by the photographer", (
        "a cup of coffee on a red saucer",
        "an espresso with a spoon on a wooden table",
        "coffee in a white and red cup, seen from above",
        "a small cup of coffee, a spoon and a red saucer on wood")),
    "rocket.jpg": ("released into the public domain by its maker", (
        "a rocket on its launch pad at dusk",
        "a white rocket between tall masts under a dark blue sky",
        "a rocket stands ready for launch",
        "a rocket lit by lamps in the evening")),
    "hubble_deep_field.jpg": ("NASA and ESA, public domain", (
        "many small galaxies in a black sky",
        "a deep view of space full of galaxies",
        "galaxies of many colours on black",
        "hundreds of bright dots and spirals in dark space")),
    "moon.png": ("NASA, public domain", (
        "the grey surface of the moon",
        "craters on the moon",
        "a round crater at the top left of a grey plain",
        "grey ground with small craters and a dark spot")),
    "coins.png": ("no known copyright restrictions", (
        "old coins in four rows",
        "ancient coins on a dark ground",
        "twenty four old coins",
        "rows of worn silver coins with faces and figures")),
    "brick.png": ("CC0", (
        "a wall of bricks",
        "grey bricks standing upright",
        "brick pattern with light joints",
        "a brick wall turned on its side")),
    "grass.png": ("CC0", (
        "grass seen from above",
        "a lawn with leaves",
        "grey picture of grass",
        "blades of grass and small leaves")),
    "gravel.png": ("CC0", (
        "gravel",
        "many small stones",
        "grey gravel seen from above",
        "a ground of broken stones")),
    "clock_motion.png": ("released into the public domain by the photographer", (
        "a blurred wall clock",
        "a round clock, blurred by motion",
        "a bright round shape on grey, out of focus",
        "a clock smeared sideways")),
}  # fmt: skip


def write_photos(folder: Path) -> int:
    """Write ``images/`` and the annotation file of LLaVA-Pretrain into `folder`; returns the number of entries.

    Raises:
        DataError: the folder exists, or this scikit-image comes without one of the pictures.
    """
    if folder.exists():
        raise DataError("output exists", where=str(folder), fix="choose another output, or remove it first")
    partial = folder.parent / f".{folder.name}.partial"
    (partial / "images").mkdir(parents=True, exist_ok=True)
    shipped = importlib.resources.files("skimage") / "data"
    entries = []
    for file, (_, captions) in PHOTOS.items():
        picture = shipped / file
        if not picture.is_file():
            raise DataError(
                "a photograph is missing", where=str(picture), fix="install scikit-image from its wheel"
            )
        (partial / "images" / file).write_bytes(picture.read_bytes())
        for number, (prompt, caption) in enumerate(zip(PROMPTS, captions, strict=True)):
            entries.append(
                {
                    "id": f"{Path(file).stem}-{number}",
                    "image": f"images/{file}",
                    "conversations": [
                        {
                            "from": "human",
                            "value": f"<image>\n{prompt}" if number % 2 else f"{prompt}\n<image>",
                        },
                        {"from": "gpt", "value": caption},
                    ],
                }
            )
    (partial / PRETRAIN_JSON).write_text(json.dumps(entries, indent=1), encoding="utf-8")
    licences = "".join(f"{file}: {licence}\n" for file, (licence, _) in PHOTOS.items())
    (partial / "LICENCES.txt").write_text(
        "Pictures from scikit-image's wheel.\n" + licences, encoding="utf-8"
    )
    partial.rename(folder)
    return len(entries)
