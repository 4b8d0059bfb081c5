"""Pictures of letters with captions, conversations and questions, in the files that training reads.

    python letters.py mine

The letters A to Z in sixteen faces of the fonts that matplotlib brings along (DejaVu Sans, Sans
Mono and Serif, and STIX General: free licences, see `LICENSE_DEJAVU` and `LICENSE_STIX` beside
them). Every pair of a letter and a face is drawn in several sizes and places, and all of its
pictures are in one split only: what the questions ask about was never seen in training.
"""

import itertools
import json
import string
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

PIXELS = 32  # height and width of a picture
COPIES = 8  # pictures of each letter in each face
SPLITS = {"train": 320, "validation": 32, "questions": 64}  # pairs of a letter and a face
STYLES = list(itertools.product(("regular", "bold"), ("upright", "italic")))
FONTS = {  # family, and the files' endings in the order of STYLES
    "DejaVuSans": ("sans", ("", "-Oblique", "-Bold", "-BoldOblique")),
    "DejaVuSansMono": ("mono", ("", "-Oblique", "-Bold", "-BoldOblique")),
    "DejaVuSerif": ("serif", ("", "-Italic", "-Bold", "-BoldItalic")),
    "STIXGeneral": ("serif", ("", "Italic", "Bol", "BolIta")),
}


def draw(letter, font, rng):
    """A dark letter on light paper, a little larger or smaller, somewhere near the middle."""
    paper = Image.new("L", (PIXELS, PIXELS), int(rng.integers(200, 256)))
    face = ImageFont.truetype(font, int(rng.integers(24, 31)))
    place = PIXELS / 2 + rng.uniform(-2, 2, 2)
    ImageDraw.Draw(paper).text(tuple(place), letter, int(rng.integers(0, 80)), face, anchor="mm")
    return paper


def turns(letter, weight, slant, family):
    """Questions about a letter with their answers."""
    return {
        "letter": ("Which letter is it?", letter),
        "weight": ("Is it bold?", "yes" if weight == "bold" else "no"),
        "slant": ("Is it italic?", "yes" if slant == "italic" else "no"),
        "family": ("Is it sans, mono or serif?", family),
    }


def record(name, pairs, image=None):
    """A conversation in LLaVA's format."""
    values = [text for pair in pairs for text in pair]
    if image:
        values[0] = f"<image>\n{values[0]}".strip()
    roles = itertools.cycle(("human", "gpt"))
    talk = [{"from": role, "value": text} for role, text in zip(roles, values, strict=False)]
    return {"id": name, "conversations": talk} | ({"image": image} if image else {})


def main(folder):
    """Writes the pictures and the files."""
    rng = np.random.default_rng(0)
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files = {"text": [], "captions": [], "train": [], "validation": [], "questions": []}
    faces = [
        (fonts / f"{name}{ending}.ttf", (weight, slant, family))
        for name, (family, endings) in FONTS.items()
        for ending, (weight, slant) in zip(endings, STYLES, strict=True)
    ]
    splits = rng.permutation([split for split, count in SPLITS.items() for _ in range(count)])
    pairs = itertools.product(string.ascii_uppercase, faces)
    for split, (letter, (font, style)) in zip(splits, pairs, strict=True):
        caption, asked = f"{' '.join(style)} letter {letter}", turns(letter, *style)
        for copy in range(COPIES if split == "train" else 1):
            image = f"images/{letter}-{font.stem}-{copy}.png"
            draw(letter, font, rng).save(folder / image)
            order = rng.permutation(list(asked))
            talk = [asked[group] for group in order]
            name = Path(image).stem
            # Text without a picture: the caption answers nothing, then come the questions.
            files["text"].append(record(name, [("", caption), *talk]))
            if split == "questions":
                files[split] += [
                    {"id": f"{name}/{group}", "image": image, "group": group}
                    | {"question": question, "answer": answer}
                    for group, (question, answer) in asked.items()
                ]
            else:
                files[str(split)].append(record(name, talk, image))
            if split == "train":
                files["captions"].append(record(name, [("", caption)], image))
    for name, records in files.items():
        ending = "jsonl" if name == "questions" else "json"
        text = "\n".join(json.dumps(item) for item in records)
        if ending == "json":
            text = "[\n" + text.replace("}\n{", "},\n{") + "\n]"
        (folder / f"{name}.{ending}").write_text(text + "\n")
        print(f"{folder / name}.{ending}: {len(records)} records")


main(Path(sys.argv[1]))
