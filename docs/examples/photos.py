"""Crops of photos with captions, conversations and questions, in the files that training reads.

    python photos.py photos

The photos come with installed packages: `china.jpg` and `flower.jpg` with scikit-learn (CC BY 2.0),
`grace_hopper.jpg` and `Minduka_Present_Blue_Pack.png` with matplotlib. Crops overlap, so a block of
a photo, 96 pixels wide, is in one split only: what the questions ask about was never seen in
training.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIDE, STEP, BLOCK = 48, 24, 96  # pixels: of a crop, between crops, of a block
ASKED, MEASURED = 0.15, 0.2  # shares of blocks: questions; questions and validation


def photos():
    """The pixels of the photos, by name."""
    china, flower = load_sample_images().images
    samples = Path(matplotlib.get_data_path(), "sample_data")
    names = {"portrait": "grace_hopper.jpg", "present": "Minduka_Present_Blue_Pack.png"}
    others = {
        name: np.asarray(Image.open(samples / file).convert("RGB")) for name, file in names.items()
    }
    return {"temple": china, "flower": flower, **others}


def split_of(photo, y, x):
    """The split of a crop; None for one that reaches out of a block that is not trained on."""
    block = np.random.default_rng((y // BLOCK, x // BLOCK, len(photo))).random()
    if block >= MEASURED:
        return "train"
    inside = max(y % BLOCK, x % BLOCK) <= BLOCK - SIDE
    return ("questions" if block < ASKED else "validation") if inside else None


def questions_about(photo, crop):
    """Questions about a crop with their answers, and its caption."""
    grey, half = crop.mean(-1), SIDE // 2
    side = "left" if grey[:, :half].mean() > grey[:, half:].mean() else "right"
    end = "top" if grey[:half].mean() > grey[half:].mean() else "bottom"
    tone = ("dark", "medium", "bright")[int(grey.mean() // 86)]
    asked = {
        "photo": ("Which picture is this from?", photo),
        "side": ("Which side is brighter, left or right?", side),
        "end": ("Which end is brighter, top or bottom?", end),
        "tone": ("Is it dark, medium or bright?", tone),
    }
    return asked, f"a {tone} part of the {photo}, brighter at the {side} and the {end}"


def record(name, values, image=None):
    """A conversation in LLaVA's format."""
    roles = ("human", "gpt") * (len(values) // 2)
    talk = [{"from": role, "value": text} for role, text in zip(roles, values, strict=True)]
    return {"id": name, "conversations": talk} | ({"image": image} if image else {})


def main(folder):
    """Writes crops and files."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files = {name: [] for name in ("text", "captions", "train", "validation", "questions")}
    rng = np.random.default_rng(0)
    for photo, pixels in photos().items():
        for y in range(0, pixels.shape[0] - SIDE + 1, STEP):
            for x in range(0, pixels.shape[1] - SIDE + 1, STEP):
                split = split_of(photo, y, x)
                if split is None:
                    continue
                crop, name = pixels[y : y + SIDE, x : x + SIDE], f"{photo}-{y}-{x}"
                image = f"images/{name}.png"
                Image.fromarray(crop).save(folder / image)
                asked, caption = questions_about(photo, crop)
                turns = [text for group in rng.permutation(list(asked)) for text in asked[group]]
                files["text"].append(record(name, ["", caption, *turns]))
                if split == "train":
                    files["captions"].append(record(name, ["<image>", caption], image))
                if split == "questions":
                    files[split] += [
                        {"id": f"{name}/{group}", "image": image, "group": group}
                        | {"question": question, "answer": answer}
                        for group, (question, answer) in asked.items()
                    ]
                else:
                    values = [f"<image>\n{turns[0]}", *turns[1:]]
                    files[split].append(record(name, values, image))
    for name, records in files.items():
        path = folder / (f"{name}.jsonl" if name == "questions" else f"{name}.json")
        lines = "\n".join(map(json.dumps, records)) + "\n"
        path.write_text(lines if name == "questions" else json.dumps(records))
        print(f"{path.as_posix()}: {len(records)} records")


main(Path(sys.argv[1]))
