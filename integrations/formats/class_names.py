"""Names of classes: of PASCAL VOC and COCO, or from a file: one name a line, or an image_labels.json."""

from __future__ import annotations

import json
from pathlib import Path

BACKGROUND = "background"
_KNOWN = {
    "voc": (
        "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, "
        "person, pottedplant, sheep, sofa, train, tvmonitor"
    ),
    "coco": (  # in the order of the 80 classes; COCO's own ids have gaps
        "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
        "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
        "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
        "skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, "
        "sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, "
        "dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, "
        "refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
    ),
}


def class_names(source: str, num_classes: int | None, background: bool = True) -> list[str]:
    """The name of each id, 0 to num_classes - 1.

    Args:
        source: "voc", "coco", or the path of a text file with one name a line, or of a .json file that holds the list
            of names under "classes". With background the file may leave out the name of id 0, which is "background"
            then.
        num_classes: number of ids, background included if there is one. None: as many as there are names. Then a first
            name other than "background" is the one of id 1.
        background: whether id 0 is background.

    Raises:
        ValueError: the file cannot be read, has an empty line between names, or has another number of names.

    >>> class_names("voc", 21)[:3]
    ['background', 'aeroplane', 'bicycle']
    """
    names = _KNOWN[source].split(", ") if source in _KNOWN else _lines(Path(source))
    if num_classes is None:
        return [BACKGROUND, *names] if background and names[:1] != [BACKGROUND] else names
    if background and len(names) == num_classes - 1:
        names = [BACKGROUND, *names]
    if len(names) != num_classes:
        wanted = f"{num_classes}, or {num_classes - 1} without background" if background else f"{num_classes}"
        raise ValueError(f"{source} has {len(names)} names for {num_classes} ids. Give a file with {wanted}.")
    return names


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Give voc, coco or a text file.") from error
    if path.suffix.lower() == ".json":
        return _listed(path, text)
    names = [line.strip() for line in text.rstrip().splitlines()]
    if "" in names:
        raise ValueError(f"{path}, line {names.index('') + 1} is empty. Write the name of one class on each line.")
    return names


def _listed(path: Path, text: str) -> list[str]:
    try:
        names = json.loads(text)["classes"]
    except (ValueError, KeyError, TypeError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{path} holds no list of names. Write {{"classes": ["cat", "dog"]}}, or one name a line.')
    return names
